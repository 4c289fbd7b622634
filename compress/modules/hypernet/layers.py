"""`HyperLinear` and `HyperConv1d/2d/3d`: torch's layers with slots for weight and bias."""

from __future__ import annotations

from typing import Any

from torch import nn

from compress.modules.hypernet.external import HyperModule


class _HyperLayer(HyperModule):
    """A torch layer made without memory, its weight and bias turned into slots."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "device": "meta"})
        self.convert_externals([n for n, p in self._parameters.items() if p is not None])
        if kwargs.get("dtype") is None:
            for slot in self._external_parameters.values():
                slot.dtype = None


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
