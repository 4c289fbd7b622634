"""Every error that this package raises on purpose.

::

    CompressError                 exit code
    ├── GateError                 1   a verification gate failed; the report is written, no model is
    ├── UsageError                2   a flag, configuration or plan that cannot be honoured
    │   ├── ConfigError           2   an unknown key, a value out of range, rules that contradict
    │   ├── BudgetError           2   a budget that no plan reaches; names the smallest reachable
    │   └── PlanError             2   a plan that does not fit the model it is applied to
    └── InputError                3   a file, model or dataset that cannot be used
        ├── CheckpointError       3   unreadable, truncated, code-carrying or wrong checkpoint
        ├── ModelError            3   a model spec that builds nothing, a forward that fails
        ├── GradientError         3   a forward or a loss that no gradients come through
        ├── DataError             3   an empty, corrupt or mislabelled dataset
        ├── CalibrationError      3   NaN or infinite activations, statistics that do not fit
        └── ArtefactError         3   a tampered, truncated or newer result; an unwritable output

    UnsupportedLayer   (ValueError) a layer or geometry that maths cannot represent exactly

A message is one paragraph: what is wrong, where (file, key, layer), what to do.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterable

# Where the code of this package lies.
_OWN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")
# Bytes of a file's name that are no UTF-8 stand as lone surrogates, which no encoding takes.
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONGEST_COMPARED, _MOST_COMPARED = 100, 20_000


class CompressError(Exception):
    """Root of all errors raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 3


class GateError(CompressError):
    """A verification gate failed."""

    exit_code = 1


class UsageError(CompressError):
    """A request that cannot be honoured as written."""

    exit_code = 2


class ConfigError(UsageError):
    """An unknown configuration key, a value out of range or rules that contradict each other."""


class BudgetError(UsageError):
    """A budget that no plan reaches; the message names the smallest reachable one."""


class PlanError(UsageError):
    """A plan that does not fit the model it is applied to."""


class InputError(CompressError):
    """A file, model or dataset that cannot be used."""


class CheckpointError(InputError):
    """A checkpoint that cannot be read or does not belong to the model."""


class ModelError(InputError):
    """A model spec that builds nothing, or a model whose forward fails."""


class GradientError(InputError):
    """A forward or a loss that no gradients come through.

    Args:
        problem: What is wrong, as a sentence.
        remedy: What to do about it, as another.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem} {remedy}")
        self.problem = problem


class DataError(InputError):
    """A dataset that is empty, corrupt or labelled out of range."""


class CalibrationError(InputError):
    """Activations that are not finite, or stored statistics that do not fit."""


class ArtefactError(InputError):
    """A result that cannot be read, or an output that cannot be written."""


class UnsupportedLayer(ValueError):  # noqa: N818 - names the thing, as torch's own errors do
    """A layer or geometry that an operation cannot represent exactly; the message is the reason."""


def near_matches(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'a' or 'b'?"`` for the known names nearest to ``name``, or ``""``."""
    # Comparing takes time that grows with the square of a name's length.
    if len(name) > _LONGEST_COMPARED:
        return ""
    some = [k for k in itertools.islice(known, _MOST_COMPARED) if len(k) <= _LONGEST_COMPARED]
    close = difflib.get_close_matches(name, some, n=3, cutoff=0.5)
    if not close:
        return ""
    return f" Did you mean {' or '.join(repr(c) for c in close)}?"


def one_line(error: BaseException) -> str:
    """Return what an exception says on one line without a full stop, or else its type."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def what_raised(problem: BaseException) -> str:
    """Name an exception and the line that raised it, of code that is not this package's.

    Returns:
        Such as ``"ValueError: no such width at net.py, line 7"``, on one line.
    """
    text = " ".join(str(problem).split()).rstrip(".")
    traceback, where = problem.__traceback__, ""
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_filename
        if not name.startswith(("<", _OWN)):
            where = f" at {os.path.basename(name)}, line {traceback.tb_lineno}"
        traceback = traceback.tb_next
    return f"{type(problem).__name__}{f': {text}' if text else ''}{where}"


def printable(text: str | os.PathLike[str]) -> str:
    r"""Return text with what no file and no terminal could take as a backslash and digits.

    A byte of a file's name that is not UTF-8 becomes ``\xe9``. All other text stays as it is.
    """
    return _SURROGATE.sub(_escaped, os.fspath(text))


def _escaped(surrogate: re.Match[str]) -> str:
    code = ord(surrogate[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
