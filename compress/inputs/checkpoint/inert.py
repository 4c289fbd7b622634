"""Values that training loops keep beside the weights, which are passed over without being made.

``torch.load(weights_only=True)`` refuses a file in which the best accuracy is a NumPy number or the
arguments are an `argparse.Namespace`. None of that is needed here. So each of these classes and
functions is replaced, for the time of one reading, by a class of this module that takes whatever it
is given and keeps nothing: nothing of NumPy's or of the standard library's is called on what the
file says, and all other names are refused as before.
"""

from __future__ import annotations

from typing import Any

# By module and name, as a pickle has them; NumPy 1 and 2, Python to 3.12 and from 3.13 on.
_PASSED_OVER = (
    *((m, n) for m in ("numpy.core.multiarray", "numpy._core.multiarray")
      for n in ("scalar", "_reconstruct")),
    ("numpy", "dtype"), ("numpy", "ndarray"),
    ("argparse", "Namespace"), ("types", "SimpleNamespace"),
    *((m, n) for m in ("pathlib", "pathlib._local")
      for n in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
)  # fmt: skip


class Inert:
    """Stands for a value that is passed over."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:
        """Take any arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        """Keep nothing of a state."""


# One class for each: torch tells them by their module and name.
STAND_INS: tuple[type[Inert], ...] = tuple(
    type(name, (Inert,), {"__module__": module, "__qualname__": name})
    for module, name in _PASSED_OVER
)
