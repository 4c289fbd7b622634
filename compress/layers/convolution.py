"""``nn.Conv2d`` and ``nn.Conv1d``, which is a ``Conv2d`` of height 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.layers.registry import LayerKind
from compress.linalg.geometry import Geometry, Pair


def pair(value: tuple[int, ...], fill: int) -> Pair:
    """Lift a one-dimensional attribute to two; height comes first and is inert."""
    return (fill, value[0]) if len(value) == 1 else (value[0], value[1])


def geometry_of_conv(module: nn.Module) -> Geometry:
    """Read the attributes of a ``Conv1d`` or ``Conv2d``."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    padding = module.padding
    return Geometry(
        kind="conv1d" if isinstance(module, nn.Conv1d) else "conv2d",
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel_size=pair(module.kernel_size, 1),
        stride=pair(module.stride, 1),
        padding=padding if isinstance(padding, str) else pair(padding, 0),
        dilation=pair(module.dilation, 1),
        groups=module.groups,
        padding_mode=module.padding_mode,
    )


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    weight = module.weight.detach()
    if weight.dim() == 3:
        weight = weight.unsqueeze(2)
    return weight.reshape(module.groups, -1, *weight.shape[1:])


def attributes(geometry: Geometry, dims: int) -> dict[str, Any]:
    """Keyword arguments of the ``nn`` constructors for the last ``dims`` dimensions."""
    padding = geometry.padding
    found: dict[str, Any] = {
        "kernel_size": geometry.kernel_size[-dims:],
        "stride": geometry.stride[-dims:],
        "padding": padding if isinstance(padding, str) else padding[-dims:],
        "dilation": geometry.dilation[-dims:],
        "groups": geometry.groups,
        "padding_mode": geometry.padding_mode,
    }
    if geometry.transposed:
        found["output_padding"] = geometry.output_padding[-dims:]
    return found


def _build(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> nn.Module:
    one = geometry.kind == "conv1d"
    # On the meta device, so that no random numbers are drawn for weights that are set at once.
    with torch.device("meta"):
        layer = (nn.Conv1d if one else nn.Conv2d)(
            geometry.in_channels,
            geometry.out_channels,
            bias=bias is not None,
            **attributes(geometry, 1 if one else 2),
        )
    flat = weight.flatten(0, 1)
    layer.weight = nn.Parameter((flat.squeeze(2) if one else flat).contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous())
    return layer


def unsupported_conv(module: nn.Module) -> str | None:
    """Say why a convolution is kept."""
    geometry = geometry_of_conv(module)
    if geometry.groups > 1 and geometry.groups == geometry.in_channels:
        return "depthwise: each output reads one input channel, so there is no rank to cut"
    return None


def images_1d(activation: Tensor) -> Tensor:
    """``[batch, channels, length]`` (or without batch) to four dimensions."""
    if activation.dim() == 2:
        activation = activation.unsqueeze(0)
    return activation.unsqueeze(2)


def images_2d(activation: Tensor) -> Tensor:
    """``[batch, channels, height, width]``, the batch added where missing."""
    return activation.unsqueeze(0) if activation.dim() == 3 else activation


CONV2D = LayerKind(nn.Conv2d, geometry_of_conv, _weight, _build, unsupported_conv, images_2d)
CONV1D = LayerKind(nn.Conv1d, geometry_of_conv, _weight, _build, unsupported_conv, images_1d)
