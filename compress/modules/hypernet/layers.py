"""`HyperLinear` and `HyperConv1d/2d/3d`: torch's layers with slots for weight and bias."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from compress.modules.hypernet.external import HyperModule
from compress.modules.hypernet.sizes import size

_LEAST = {
    "in_features": 0, "out_features": 0, "in_channels": 0, "out_channels": 0, "groups": 1,
    "kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1,
}  # fmt: skip


class _HyperLayer(HyperModule):
    """A torch layer made without memory, its weight and bias turned into slots."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        args, kwargs = _checked(type(self), args, kwargs)
        super().__init__(*args, **{**kwargs, "device": "meta"})
        self.convert_externals([n for n, p in self._parameters.items() if p is not None])
        if kwargs.get("dtype") is None:
            for slot in self._external_parameters.values():
                slot.dtype = None


def _checked(
    kind: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer, its sizes as ``int``.

    Raises:
        TypeError: A size that is a boolean, a float or anything else that is not an integer.
        ValueError: A size below its least.
    """
    plain = next(base for base in kind.__mro__ if not issubclass(base, HyperModule))
    names = list(inspect.signature(plain).parameters)
    positional = list(args)
    for index, name in enumerate(names[: len(args)]):
        positional[index] = _checked_size(kind, name, args[index])
    return tuple(positional), {n: _checked_size(kind, n, v) for n, v in kwargs.items()}


def _checked_size(kind: type[nn.Module], name: str, value: Any) -> Any:
    # padding may be "same" or "valid", which torch checks
    if name not in _LEAST or (name == "padding" and isinstance(value, str)):
        return value
    what = f"{kind.__name__}: {name}"
    if getattr(value, "ndim", 0):  # an array of numpy's
        value = value.tolist()
    if isinstance(value, tuple | list):
        return tuple(size(f"{what}[{i}]", side, _LEAST[name]) for i, side in enumerate(value))
    return size(what, value, _LEAST[name])


class HyperLinear(_HyperLayer, nn.Linear):
    """``nn.Linear`` with slots ``weight`` ``[out, in]`` and ``bias`` ``[out]``.

    Takes the arguments of ``nn.Linear``. Device is the values', dtype too unless one is given.
    """


class HyperConv1d(_HyperLayer, nn.Conv1d):
    """``nn.Conv1d``, its padding modes included, with slots ``weight`` and ``bias``."""


class HyperConv2d(_HyperLayer, nn.Conv2d):
    """``nn.Conv2d``, its padding modes included, with slots ``weight`` and ``bias``."""


class HyperConv3d(_HyperLayer, nn.Conv3d):
    """``nn.Conv3d``, its padding modes included, with slots ``weight`` and ``bias``."""
