"""``nn.Conv3d``, ``nn.Conv2d``, and ``nn.Conv1d``, which is a ``Conv2d`` of height 1."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from compress.layers.registry import LayerKind
from compress.linalg.geometry import Geometry, Kind, Sizes

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_TYPES: dict[str, type[Convolution]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
}


def lifted(value: tuple[int, ...], fill: int) -> Sizes:
    """Lift a one-dimensional attribute to two; height comes first and is inert."""
    return (fill, value[0]) if len(value) == 1 else tuple(value)


def geometry_of_conv(module: nn.Module) -> Geometry:
    """Read the attributes of a convolution."""
    assert isinstance(module, Convolution)
    padding = module.padding
    return Geometry(
        kind=cast(Kind, f"conv{len(module.kernel_size)}d"),
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel_size=lifted(module.kernel_size, 1),
        stride=lifted(module.stride, 1),
        padding=padding if isinstance(padding, str) else lifted(padding, 0),
        dilation=lifted(module.dilation, 1),
        groups=module.groups,
        padding_mode=module.padding_mode,
    )


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, Convolution)
    weight = module.weight.detach()
    if weight.dim() == 3:
        weight = weight.unsqueeze(2)
    return weight.reshape(module.groups, -1, *weight.shape[1:])


def attributes(geometry: Geometry) -> dict[str, Any]:
    """Keyword arguments of the ``nn`` constructors."""
    padding, dims = geometry.padding, dimensions(geometry)
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


def dimensions(geometry: Geometry) -> int:
    """How many spatial axes a convolution really has."""
    return int(geometry.kind[-2])


def _build(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> nn.Module:
    # On the meta device, so that no random numbers are drawn for weights that are set at once.
    with torch.device("meta"):
        layer = _TYPES[geometry.kind](
            geometry.in_channels,
            geometry.out_channels,
            bias=bias is not None,
            **attributes(geometry),
        )
    flat = weight.flatten(0, 1)
    layer.weight = nn.Parameter(
        (flat.squeeze(2) if dimensions(geometry) == 1 else flat).contiguous()
    )
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


def images_3d(activation: Tensor) -> Tensor:
    """``[batch, channels, depth, height, width]``, the batch added where missing."""
    return activation.unsqueeze(0) if activation.dim() == 4 else activation


CONV3D = LayerKind(nn.Conv3d, geometry_of_conv, _weight, _build, unsupported_conv, images_3d)
CONV2D = LayerKind(nn.Conv2d, geometry_of_conv, _weight, _build, unsupported_conv, images_2d)
CONV1D = LayerKind(nn.Conv1d, geometry_of_conv, _weight, _build, unsupported_conv, images_1d)
