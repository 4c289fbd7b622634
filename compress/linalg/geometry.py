"""The geometry of one linear layer, and the rows (patches) it multiplies.

Every supported layer is seen as a convolution in two or three dimensions: a linear layer is 1x1, a
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

Kind = Literal[
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d",
]  # fmt: skip
# One number for each spatial axis: height and width, in three dimensions with the depth before.
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Shape and attributes of one layer, as the convolution in two or three dimensions that it is.

    Attributes:
        kind: Which ``nn`` layer it is.
        in_channels: Input channels over all groups.
        out_channels: Output channels over all groups.
        kernel_size: ``(k_h, k_w)`` or ``(k_d, k_h, k_w)``; ``(1, 1)`` for linear, ``(1, k)`` in
            one dimension.
        stride: Of each axis, as the kernel's size.
        padding: Of each axis, or ``"same"`` or ``"valid"`` as torch takes them.
        dilation: Of each axis.
        groups: Number of groups.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        output_padding: Extra size of one side, transposed convolutions only.
    """

    kind: Kind
    in_channels: int
    out_channels: int
    kernel_size: Sizes = (1, 1)
    stride: Sizes = (1, 1)
    padding: Sizes | str = (0, 0)
    dilation: Sizes = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    output_padding: Sizes = (0, 0)

    @property
    def transposed(self) -> bool:
        """Whether this is a transposed convolution."""
        return self.kind.startswith("conv_transpose")

    @property
    def out_features(self) -> int:
        """Output channels of one group."""
        return self.out_channels // self.groups

    @property
    def in_features(self) -> int:
        """Length ``d`` of one group's patch row, ``c_in / groups`` times the kernel's taps."""
        return self.in_channels // self.groups * math.prod(self.kernel_size)

    @property
    def full_rank(self) -> int:
        """Largest rank of one group's weight matrix."""
        return min(self.in_features, self.out_features)

    @property
    def weight_numel(self) -> int:
        """Number of weights."""
        return self.groups * self.out_features * self.in_features

    def sides(self) -> tuple[tuple[int, int], ...]:
        """Padding before and after each axis; "same" puts the odd one last, as torch."""
        if self.padding == "valid":
            return tuple((0, 0) for _ in self.kernel_size)
        if isinstance(self.padding, str):
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return tuple((total // 2, total - total // 2) for total in totals)
        return tuple((amount, amount) for amount in self.padding)

    def output_size(self, size: Sizes) -> Sizes:
        """Size of the output's axes for an input whose axes have ``size``."""
        sides = self.sides()
        out = []
        for axis, length in enumerate(size):
            span = self.dilation[axis] * (self.kernel_size[axis] - 1)
            pad = sum(sides[axis])
            if self.transposed:
                grown = (length - 1) * self.stride[axis] - pad + span + 1
                out.append(grown + self.output_padding[axis])
            else:
                out.append((length + pad - span - 1) // self.stride[axis] + 1)
        return tuple(out)

    def macs(self, size: Sizes) -> int:
        """Multiply-accumulates for one input whose axes have ``size``.

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
        x: Input activation ``[batch, in_channels, *size]``.
        geometry: The layer that reads it.

    Returns:
        A view ``[batch, in_channels, *output_size, *kernel]``, taps in the order of the layer's own
        kernel; a copy for transposed convolutions, whose taps run backwards.
    """
    if geometry.transposed:
        return _stuffed_patch_view(x, geometry).flip(*_last(len(geometry.kernel_size)))
    sides = geometry.sides()
    if any(map(any, sides)):
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        # F.pad takes the last axis first.
        x = F.pad(x, [side for axis in reversed(sides) for side in axis], mode=mode)
    return _windows(x, geometry.kernel_size, geometry.stride, geometry.dilation)


def _last(axes: int) -> range:
    return range(-axes, 0)


def _windows(x: Tensor, kernel: Sizes, stride: Sizes, dilation: Sizes) -> Tensor:
    out = [
        (length - d * (k - 1) - 1) // s + 1
        for length, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    if math.prod(kernel) > 1:
        # Channels last: gathering a patch then copies whole runs of channels (3 to 5 times as
        # fast). A single tap is gathered once, so that this copy would cost more than it saves.
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        x = x.contiguous(memory_format=last)
    batch, channels, *steps = x.stride()
    return x.as_strided(
        (*x.shape[:2], *out, *kernel),
        (
            batch,
            channels,
            *(step * s for step, s in zip(steps, stride, strict=True)),
            *(step * d for step, d in zip(steps, dilation, strict=True)),
        ),
        x.storage_offset(),
    )


def _stuffed_patch_view(x: Tensor, geometry: Geometry) -> Tensor:
    """View the patches that a transposed convolution reads, taps in reverse."""
    sizes = zip(x.shape[2:], geometry.stride, strict=True)
    stuffed = x.new_zeros(*x.shape[:2], *((length - 1) * s + 1 for length, s in sizes))
    stuffed[(slice(None), slice(None), *(slice(None, None, s) for s in geometry.stride))] = x
    pads = []
    for axis in reversed(range(len(geometry.kernel_size))):  # F.pad takes the last axis first
        span = geometry.dilation[axis] * (geometry.kernel_size[axis] - 1)
        before, after = geometry.sides()[axis]
        pads += [span - before, span - after + geometry.output_padding[axis]]
    padded = F.pad(stuffed, pads)  # a negative pad crops
    one = tuple(1 for _ in geometry.kernel_size)
    return _windows(padded, geometry.kernel_size, one, geometry.dilation)


def patch_rows(x: Tensor, geometry: Geometry, positions: Tensor | None = None) -> Tensor:
    """Patch rows of an activation.

    Args:
        x: Input activation ``[batch, in_channels, *size]``.
        geometry: The layer that reads it.
        positions: Flat output positions ``[images, samples]`` to take of each image; all if None.
            Where ``batch`` is a multiple of ``images``, the extra axis is part of the position.

    Returns:
        ``[groups, rows, in_features]``, rows of an image next to each other.
    """
    view = _stuffed_patch_view(x, geometry) if geometry.transposed else patch_view(x, geometry)
    axes = len(geometry.kernel_size)
    batch, channels, out = view.shape[0], view.shape[1], view.shape[2 : 2 + axes]
    view = view.movedim(1, -1)
    if positions is None:
        rows = view.reshape(batch * math.prod(out), *geometry.kernel_size, channels)
    else:
        rows = view[_located(positions, batch, out)]
    rows = rows.movedim(-1, 1)
    if geometry.transposed:
        rows = rows.flip(*_last(axes))
    grouped = rows.reshape(rows.shape[0], geometry.groups, geometry.in_features)
    return grouped.transpose(0, 1)


def output_rows(y: Tensor, geometry: Geometry, positions: Tensor | None = None) -> Tensor:
    """Rows of an output activation ``[batch, out_channels, *size]``.

    Returns:
        ``[groups, rows, out_features]``, in the order of `patch_rows`.
    """
    if positions is None:
        rows = y.flatten(2).transpose(1, 2).reshape(-1, geometry.groups, geometry.out_features)
    else:
        taken = y.movedim(1, -1)[_located(positions, y.shape[0], y.shape[2:])]
        rows = taken.reshape(-1, geometry.groups, geometry.out_features)
    return rows.transpose(0, 1)


def _located(positions: Tensor, batch: int, size: torch.Size) -> tuple[Tensor, ...]:
    """Turn positions ``[images, samples]`` into flat indices of the batch and of every axis."""
    images, places = positions.shape[0], math.prod(size)
    base = torch.arange(images, device=positions.device).unsqueeze(1) * (batch // images)
    place = (positions % places).flatten()
    within = []
    for length in reversed(size):
        within.append(place % length)
        place = place // length
    return (base + positions // places).flatten(), *reversed(within)
