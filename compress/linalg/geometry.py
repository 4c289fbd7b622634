"""The geometry of one linear layer, and the rows (patches) it multiplies.

Every supported layer is seen as a two-dimensional convolution: a linear layer is 1x1, a
one-dimensional convolution has height 1, and a transposed convolution is a convolution over the
zero-stuffed input with a flipped kernel (Dumoulin & Visin, "A guide to convolution arithmetic").
Its output at every position is then ``y = W x + b`` with a patch row ``x``, padding included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["linear", "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Shape and attributes of one layer, as the two-dimensional convolution that it is.

    Attributes:
        kind: Which ``nn`` layer it is.
        in_channels: Input channels over all groups.
        out_channels: Output channels over all groups.
        kernel_size: ``(k_h, k_w)``; ``(1, 1)`` for linear, ``(1, k)`` in one dimension.
        stride: ``(s_h, s_w)``.
        padding: ``(p_h, p_w)``, or ``"same"`` or ``"valid"`` as torch takes them.
        dilation: ``(d_h, d_w)``.
        groups: Number of groups.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        output_padding: Extra size of one side, transposed convolutions only.
    """

    kind: Kind
    in_channels: int
    out_channels: int
    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair | str = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    output_padding: Pair = (0, 0)

    @property
    def transposed(self) -> bool:
        """Whether this is a transposed convolution."""
        return self.kind in ("conv_transpose1d", "conv_transpose2d")

    @property
    def out_features(self) -> int:
        """Output channels of one group."""
        return self.out_channels // self.groups

    @property
    def in_features(self) -> int:
        """Length ``d`` of one group's patch row, ``c_in / groups * k_h * k_w``."""
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    @property
    def full_rank(self) -> int:
        """Largest rank of one group's weight matrix."""
        return min(self.in_features, self.out_features)

    @property
    def weight_numel(self) -> int:
        """Number of weights."""
        return self.groups * self.out_features * self.in_features

    def sides(self) -> tuple[Pair, Pair]:
        """Padding as ``((top, bottom), (left, right))``; "same" puts the odd one last, as torch."""
        if self.padding == "valid":
            return (0, 0), (0, 0)
        if isinstance(self.padding, str):
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            top, left = (t // 2 for t in totals)
            return (top, totals[0] - top), (left, totals[1] - left)
        return (self.padding[0], self.padding[0]), (self.padding[1], self.padding[1])

    def output_size(self, size: Pair) -> Pair:
        """Height and width of the output for an input of height and width ``size``."""
        sides = self.sides()
        out = []
        for axis in (0, 1):
            span = self.dilation[axis] * (self.kernel_size[axis] - 1)
            pad = sum(sides[axis])
            if self.transposed:
                grown = (size[axis] - 1) * self.stride[axis] - pad + span + 1
                out.append(grown + self.output_padding[axis])
            else:
                out.append((size[axis] + pad - span - 1) // self.stride[axis] + 1)
        return out[0], out[1]

    def macs(self, size: Pair) -> int:
        """Multiply-accumulates for one input of height and width ``size``.

        Transposed convolutions count per input position, as torch's flop counter does.
        """
        positions = math.prod(size if self.transposed else self.output_size(size))
        return positions * self.weight_numel

    def with_(self, **changes: object) -> Geometry:
        """Return a copy with ``changes`` applied."""
        return replace(self, **changes)  # type: ignore[arg-type]  # replace checks names, not types


def patch_view(x: Tensor, geometry: Geometry) -> Tensor:
    """View the patches of an activation without copying them (beyond the padding).

    Args:
        x: Input activation ``[batch, in_channels, height, width]``.
        geometry: The layer that reads it.

    Returns:
        A view ``[batch, in_channels, out_h, out_w, k_h, k_w]``, taps in the order of the layer's
        own kernel; a copy for transposed convolutions, whose taps run backwards.
    """
    if geometry.transposed:
        return _stuffed_patch_view(x, geometry).flip(-1, -2)
    (top, bottom), (left, right) = geometry.sides()
    if top or bottom or left or right:
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        x = F.pad(x, (left, right, top, bottom), mode=mode)
    return _windows(x, geometry.kernel_size, geometry.stride, geometry.dilation)


def _windows(x: Tensor, kernel: Pair, stride: Pair, dilation: Pair) -> Tensor:
    batch, channels, height, width = x.shape
    out_h = (height - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    out_w = (width - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    if kernel != (1, 1):
        # Channels last: gathering a patch then copies whole runs of channels (3 to 5 times as
        # fast). A single tap is gathered once, so that this copy would cost more than it saves.
        x = x.contiguous(memory_format=torch.channels_last)
    b, c, h, w = x.stride()
    return x.as_strided(
        (batch, channels, out_h, out_w, *kernel),
        (b, c, h * stride[0], w * stride[1], h * dilation[0], w * dilation[1]),
        x.storage_offset(),
    )


def _stuffed_patch_view(x: Tensor, geometry: Geometry) -> Tensor:
    """View the patches that a transposed convolution reads, taps in reverse."""
    batch, channels, height, width = x.shape
    s_h, s_w = geometry.stride
    stuffed = x.new_zeros(batch, channels, (height - 1) * s_h + 1, (width - 1) * s_w + 1)
    stuffed[:, :, ::s_h, ::s_w] = x
    pads = []
    for axis in (1, 0):  # F.pad takes the last axis first
        span = geometry.dilation[axis] * (geometry.kernel_size[axis] - 1)
        before, after = geometry.sides()[axis]
        pads += [span - before, span - after + geometry.output_padding[axis]]
    padded = F.pad(stuffed, pads)  # a negative pad crops
    return _windows(padded, geometry.kernel_size, (1, 1), geometry.dilation)


def patch_rows(x: Tensor, geometry: Geometry, positions: Tensor | None = None) -> Tensor:
    """Patch rows of an activation.

    Args:
        x: Input activation ``[batch, in_channels, height, width]``.
        geometry: The layer that reads it.
        positions: Flat output positions ``[images, samples]`` to take of each image; all if None.
            Where ``batch`` is a multiple of ``images``, the extra axis is part of the position.

    Returns:
        ``[groups, rows, in_features]``, rows of an image next to each other.
    """
    view = _stuffed_patch_view(x, geometry) if geometry.transposed else patch_view(x, geometry)
    batch, channels, out_h, out_w, k_h, k_w = view.shape
    view = view.permute(0, 2, 3, 4, 5, 1)
    if positions is None:
        rows = view.reshape(batch * out_h * out_w, k_h, k_w, channels)
    else:
        image, place = _locate(positions, batch, out_h * out_w)
        rows = view[image, place // out_w, place % out_w]
    rows = rows.permute(0, 3, 1, 2)
    if geometry.transposed:
        rows = rows.flip(-1, -2)
    grouped = rows.reshape(rows.shape[0], geometry.groups, geometry.in_features)
    return grouped.transpose(0, 1)


def output_rows(y: Tensor, geometry: Geometry, positions: Tensor | None = None) -> Tensor:
    """Rows of an output activation ``[batch, out_channels, height, width]``.

    Returns:
        ``[groups, rows, out_features]``, in the order of `patch_rows`.
    """
    if positions is None:
        rows = y.flatten(2).transpose(1, 2).reshape(-1, geometry.groups, geometry.out_features)
    else:
        image, place = _locate(positions, y.shape[0], y.shape[2] * y.shape[3])
        taken = y.permute(0, 2, 3, 1)[image, place // y.shape[3], place % y.shape[3]]
        rows = taken.reshape(-1, geometry.groups, geometry.out_features)
    return rows.transpose(0, 1)


def _locate(positions: Tensor, batch: int, places: int) -> tuple[Tensor, Tensor]:
    """Turn positions ``[images, samples]`` into flat batch indices and places within them."""
    images = positions.shape[0]
    base = torch.arange(images, device=positions.device).unsqueeze(1) * (batch // images)
    return (base + positions // places).flatten(), (positions % places).flatten()
