"""Transposed convolutions in one to three dimensions: convolutions over the stuffed input."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from compress.layers.convolution import (
    attributes,
    dimensions,
    images_1d,
    images_2d,
    images_3d,
    lifted,
)
from compress.layers.registry import LayerKind
from compress.linalg.geometry import Geometry, Kind

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_TYPES: dict[str, type[Transposed]] = {
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}


def _geometry(module: nn.Module) -> Geometry:
    assert isinstance(module, Transposed)
    padding = module.padding
    assert not isinstance(padding, str)  # torch takes numbers alone here
    return Geometry(
        kind=cast(Kind, f"conv_transpose{len(module.kernel_size)}d"),
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel_size=lifted(module.kernel_size, 1),
        stride=lifted(module.stride, 1),
        padding=lifted(padding, 0),
        dilation=lifted(module.dilation, 1),
        groups=module.groups,
        output_padding=lifted(module.output_padding, 0),
    )


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, Transposed)
    weight = module.weight.detach()  # [in, out / groups, ...]
    if weight.dim() == 3:
        weight = weight.unsqueeze(2)
    return weight.reshape(module.groups, -1, *weight.shape[1:]).transpose(1, 2)


def _build(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> nn.Module:
    with torch.device("meta"):
        layer = _TYPES[geometry.kind](
            geometry.in_channels,
            geometry.out_channels,
            bias=bias is not None,
            **attributes(geometry),
        )
    flat = weight.transpose(1, 2).flatten(0, 1)
    layer.weight = nn.Parameter(
        (flat.squeeze(2) if dimensions(geometry) == 1 else flat).contiguous()
    )
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous())
    return layer


def _unsupported(module: nn.Module) -> str | None:
    geometry = _geometry(module)
    if geometry.groups > 1 and geometry.groups == geometry.in_channels:
        return "depthwise: each output reads one input channel, so there is no rank to cut"
    return None


CONV_TRANSPOSE3D = LayerKind(
    nn.ConvTranspose3d, _geometry, _weight, _build, _unsupported, images_3d
)
CONV_TRANSPOSE2D = LayerKind(
    nn.ConvTranspose2d, _geometry, _weight, _build, _unsupported, images_2d
)
CONV_TRANSPOSE1D = LayerKind(
    nn.ConvTranspose1d, _geometry, _weight, _build, _unsupported, images_1d
)
