"""``nn.ConvTranspose2d`` and ``nn.ConvTranspose1d``: convolutions over the stuffed input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.layers.convolution import attributes, images_1d, images_2d, pair
from compress.layers.registry import LayerKind
from compress.linalg.geometry import Geometry


def _geometry(module: nn.Module) -> Geometry:
    assert isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d)
    one = isinstance(module, nn.ConvTranspose1d)
    padding = module.padding
    assert not isinstance(padding, str)  # torch takes numbers alone here
    return Geometry(
        kind="conv_transpose1d" if one else "conv_transpose2d",
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel_size=pair(module.kernel_size, 1),
        stride=pair(module.stride, 1),
        padding=pair(padding, 0),
        dilation=pair(module.dilation, 1),
        groups=module.groups,
        output_padding=pair(module.output_padding, 0),
    )


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d)
    weight = module.weight.detach()  # [in, out / groups, ...]
    if weight.dim() == 3:
        weight = weight.unsqueeze(2)
    return weight.reshape(module.groups, -1, *weight.shape[1:]).transpose(1, 2)


def _build(geometry: Geometry, weight: Tensor, bias: Tensor | None) -> nn.Module:
    one = geometry.kind == "conv_transpose1d"
    dims = 1 if one else 2
    with torch.device("meta"):
        layer = (nn.ConvTranspose1d if one else nn.ConvTranspose2d)(
            geometry.in_channels,
            geometry.out_channels,
            bias=bias is not None,
            **attributes(geometry, dims),
        )
    flat = weight.transpose(1, 2).flatten(0, 1)
    layer.weight = nn.Parameter((flat.squeeze(2) if one else flat).contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous())
    return layer


def _unsupported(module: nn.Module) -> str | None:
    geometry = _geometry(module)
    if geometry.groups > 1 and geometry.groups == geometry.in_channels:
        return "depthwise: each output reads one input channel, so there is no rank to cut"
    return None


CONV_TRANSPOSE2D = LayerKind(
    nn.ConvTranspose2d, _geometry, _weight, _build, _unsupported, images_2d
)
CONV_TRANSPOSE1D = LayerKind(
    nn.ConvTranspose1d, _geometry, _weight, _build, _unsupported, images_1d
)
