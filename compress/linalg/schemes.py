"""The schemes: which chain of narrower layers stands for one layer, and what each stage costs.

All of them split the layer's patch index ``(channel, row, column)`` into an *inner* part, read by
the first factor ``A [r, inner]``, and an *outer* part, the taps of the last factor
``B [out, r, outer]``::

    output     inner = channel x row x column    outer = nothing       k x k to r, then 1 x 1
    input      inner = channel                   outer = row x column  1 x 1 to r, then k x k
    spatial    inner = channel x row             outer = column        k x 1 to r, then 1 x k
    two_sided  as input, with B itself of rank r2: 1 x 1, k x k, 1 x 1   (Tucker-2)
"""

from __future__ import annotations

import math

from torch import Tensor

from compress.linalg.geometry import Geometry, Pair

Ranks = tuple[int, ...]
SCHEME_NAMES = ("output", "input", "two_sided", "spatial")


def unavailable(geometry: Geometry, scheme: str) -> str | None:
    """Return why a scheme cannot stand for this layer exactly, or None where it can."""
    if geometry.full_rank < 2:
        return "its weight has rank 1 in each group already"
    taps = math.prod(geometry.kernel_size)
    if scheme == "spatial" and min(geometry.kernel_size) == 1:
        return "its kernel has one row or one column, so that nothing is separable"
    if scheme == "input" and taps == 1:
        return "its kernel is 1x1, where the output scheme fits no worse at no more cost"
    if scheme == "two_sided" and taps == 1:
        return "its kernel is 1x1, where it is the output scheme with a wasted stage"
    return None


def full_ranks(geometry: Geometry, scheme: str) -> Ranks:
    """Return the ranks (per group) at which the scheme is the identity on every weight."""
    taps = math.prod(geometry.kernel_size)
    inputs = geometry.in_channels // geometry.groups
    outputs = geometry.out_features
    if scheme == "output":
        return (geometry.full_rank,)
    if scheme == "input":
        return (min(inputs, outputs * taps),)
    if scheme == "spatial":
        k_h, k_w = geometry.kernel_size
        return (min(inputs * k_h, outputs * k_w),)
    if scheme == "two_sided":
        return min(inputs, outputs * taps), min(outputs, inputs * taps)
    raise ValueError(f"no scheme {scheme!r}")


def _pointwise(geometry: Geometry, inputs: int, outputs: int) -> Geometry:
    kind = {"conv_transpose1d": "conv1d", "conv_transpose2d": "conv2d"}.get(geometry.kind)
    return Geometry(
        kind=kind or geometry.kind,  # type: ignore[arg-type]  # the values are Kinds
        in_channels=inputs,
        out_channels=outputs,
        groups=geometry.groups,
    )


def _along(geometry: Geometry, axis: int, inputs: int, outputs: int) -> Geometry:
    """Return the one-dimensional stage that acts along ``axis`` alone."""

    def only(pair: Pair, otherwise: int) -> Pair:
        return (pair[0], otherwise) if axis == 0 else (otherwise, pair[1])

    padding = geometry.padding
    return geometry.with_(
        in_channels=inputs,
        out_channels=outputs,
        kernel_size=only(geometry.kernel_size, 1),
        stride=only(geometry.stride, 1),
        padding=padding if isinstance(padding, str) else only(padding, 0),
        dilation=only(geometry.dilation, 1),
        output_padding=only(geometry.output_padding, 0),
    )


def stages(geometry: Geometry, scheme: str, ranks: Ranks) -> tuple[Geometry, ...]:
    """Return the geometry of every stage of the chain, first to last."""
    wide = [r * geometry.groups for r in ranks]
    inputs, outputs = geometry.in_channels, geometry.out_channels
    if scheme == "output":
        narrow = geometry.with_(out_channels=wide[0])
        return narrow, _pointwise(geometry, wide[0], outputs)
    if scheme == "input":
        return _pointwise(geometry, inputs, wide[0]), geometry.with_(in_channels=wide[0])
    if scheme == "spatial":
        return _along(geometry, 0, inputs, wide[0]), _along(geometry, 1, wide[0], outputs)
    if scheme == "two_sided":
        core = geometry.with_(in_channels=wide[0], out_channels=wide[1])
        return _pointwise(geometry, inputs, wide[0]), core, _pointwise(geometry, wide[1], outputs)
    raise ValueError(f"no scheme {scheme!r}")


def chain_macs(chain: tuple[Geometry, ...], size: Pair) -> int:
    """Multiply-accumulates of a chain for one input of height and width ``size``."""
    total = 0
    for stage in chain:
        total += stage.macs(size)
        size = stage.output_size(size)
    return total


def chain_params(chain: tuple[Geometry, ...], biased: bool = True) -> int:
    """Number of parameters of a chain whose last stage alone has a bias."""
    return sum(stage.weight_numel for stage in chain) + (chain[-1].out_channels if biased else 0)


def split_weight(weight: Tensor, scheme: str) -> Tensor:
    """Reorder a weight ``[groups, out, in, k_h, k_w]`` to ``[groups, out, outer, inner]``."""
    groups, out, channels, k_h, k_w = weight.shape
    if scheme == "output":
        return weight.reshape(groups, out, 1, -1)
    if scheme == "spatial":
        return weight.permute(0, 1, 4, 2, 3).reshape(groups, out, k_w, channels * k_h)
    return weight.permute(0, 1, 3, 4, 2).reshape(groups, out, k_h * k_w, channels)


def split_covariance(covariance: Tensor, geometry: Geometry, scheme: str) -> Tensor:
    """Reorder ``[groups, d, d]`` over patches to ``[groups, outer, inner, outer, inner]``."""
    groups = covariance.shape[0]
    k_h, k_w = geometry.kernel_size
    channels = geometry.in_channels // geometry.groups
    if scheme == "output":
        d = geometry.in_features
        return covariance.reshape(groups, 1, d, 1, d)
    full = covariance.reshape(groups, channels, k_h, k_w, channels, k_h, k_w)
    if scheme == "spatial":
        ordered = full.permute(0, 3, 1, 2, 6, 4, 5)
        return ordered.reshape(groups, k_w, channels * k_h, k_w, channels * k_h)
    ordered = full.permute(0, 2, 3, 1, 5, 6, 4)
    return ordered.reshape(groups, k_h * k_w, channels, k_h * k_w, channels)


def stage_weights(
    geometry: Geometry, scheme: str, first: Tensor, last: Tensor, up: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Turn factors into the stages' weights ``[groups, out, in, k_h, k_w]``.

    Args:
        geometry: The layer that the chain replaces.
        scheme: The scheme's name.
        first: ``A [groups, r, inner]``.
        last: ``B [groups, out, r, outer]``; for ``two_sided`` the core, with ``out = r2``.
        up: For ``two_sided``, the last projection ``[groups, out, r2]``.
    """
    groups, rank, _ = first.shape
    k_h, k_w = geometry.kernel_size
    channels = geometry.in_channels // geometry.groups
    if scheme == "output":
        return first.reshape(groups, rank, channels, k_h, k_w), last.unsqueeze(-1)
    if scheme == "spatial":
        return first.reshape(groups, rank, channels, k_h, 1), last.unsqueeze(-2)
    lifted = first.reshape(groups, rank, channels, 1, 1)
    core = last.reshape(groups, last.shape[1], rank, k_h, k_w)
    if scheme == "input":
        return lifted, core
    if up is None:
        raise ValueError("two_sided needs its last projection")
    return lifted, core, up.reshape(*up.shape, 1, 1)
