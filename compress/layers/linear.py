"""``nn.Linear``: the 1x1 case."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.layers.registry import LayerKind
from compress.linalg.geometry import Geometry


def _geometry(module: nn.Module) -> Geometry:
    assert isinstance(module, nn.Linear)
    return Geometry("linear", module.in_features, module.out_features)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.Linear)
    return module.weight.detach()[None, :, :, None, None]


def _build(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> nn.Module:
    with torch.device("meta"):
        layer = nn.Linear(geometry.in_channels, geometry.out_channels, bias is not None)
    layer.weight = nn.Parameter(weight[0, :, :, 0, 0].contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous())
    return layer


def _unsupported(module: nn.Module) -> str | None:
    del module
    return None


def _images(activation: Tensor) -> Tensor:
    """``[batch, ..., features]`` to ``[batch, features, positions, 1]``; one row is an image."""
    if activation.dim() == 1:
        activation = activation.unsqueeze(0)
    if activation.dim() == 2:
        return activation[:, :, None, None]
    return activation.flatten(1, -2).mT.unsqueeze(3)


LINEAR = LayerKind(nn.Linear, _geometry, _weight, _build, _unsupported, _images)
