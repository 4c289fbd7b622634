"""Combining convolutions and folding BatchNorm, exactly or not at all.

Two convolutions in a row are one convolution on the grid of their taps, except where the second
one pads: it then reads padding where the single convolution would read the first one's values.
Everything here is computed in float64 and cast back, and refuses with
`UnsupportedLayer`, naming the reason, what a single convolution cannot compute exactly.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import nn

from compress.errors import UnsupportedLayer
from compress.linalg.kernels import (
    Pair,
    compose_kernels,
    fold_batch_norm,
    push_bias,
    regroup,
    spatial_size,
    wide_dtype,
)

__all__ = ["combine", "combined_dilation", "fold_batch_norm", "padding_sides", "resolve_padding"]
_AXES = ("height", "width")


def combine(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d:
    """Return the one convolution that equals ``second(first(x))`` for every ``x``.

    Kernels of any size compose: the result has ``(k1 - 1) d1 + (k2 - 1) d2 s1 + 1`` rows and
    columns on the coarsest grid that holds all taps. Groups may differ (a depthwise convolution
    before a pointwise one): the result has their greatest common divisor.

    Args:
        first: Applied first, weight ``[hidden, c_in / groups, k1_h, k1_w]``.
        second: Applied to its output, weight ``[c_out, hidden / groups, k2_h, k2_w]``.

    Returns:
        A new convolution in the dtype and on the device of ``second``; the arguments are as they
        were. It has a bias where either has one.

    Raises:
        UnsupportedLayer: The result would not be exact: the second pads what a first with a kernel
            wider than 1 computed, or (with zeros) what a bias was added to; padding modes differ;
            padding of a strided output other than by zeros; or the layers do not fit.
    """
    _check_pair(first, second)
    stride1, dilation1, kernel1 = (
        _pair(first.stride),
        _pair(first.dilation),
        spatial_size(first.weight),
    )
    stride2, dilation2, kernel2 = (
        _pair(second.stride),
        _pair(second.dilation),
        spatial_size(second.weight),
    )
    sides, mode = _combined_padding(first, second)
    grid = combined_dilation(kernel1, dilation1, stride1, kernel2, dilation2)
    groups = math.gcd(first.groups, second.groups)
    with torch.no_grad():
        weight = compose_kernels(
            regroup(first.weight, first.groups, groups).to(wide_dtype(first.weight)),
            regroup(second.weight, second.groups, groups).to(wide_dtype(second.weight)),
            groups=groups,
            steps1=(dilation1[0] // grid[0], dilation1[1] // grid[1]),
            steps2=(dilation2[0] * stride1[0] // grid[0], dilation2[1] * stride1[1] // grid[1]),
        )
        bias = push_bias(first.bias, second.weight, second.bias, groups=second.groups)
    size = spatial_size(weight)
    stride = (stride1[0] * stride2[0], stride1[1] * stride2[1])
    result = nn.Conv2d(
        first.in_channels,
        second.out_channels,
        size,
        stride=stride,
        padding=_as_padding(sides, size, stride, grid),
        dilation=grid,
        groups=groups,
        bias=bias is not None,
        padding_mode=mode,  # type: ignore[arg-type]  # a mode that torch gave us
        device="meta",
        dtype=second.weight.dtype,
    )
    trained = first.weight.requires_grad or second.weight.requires_grad
    result.weight = nn.Parameter(weight.to(second.weight.dtype), requires_grad=trained)
    if bias is not None:
        result.bias = nn.Parameter(bias.to(second.weight.dtype), requires_grad=trained)
    return result.train(second.training)


def combined_dilation(
    kernel1: Pair, dilation1: Pair, stride1: Pair, kernel2: Pair, dilation2: Pair
) -> Pair:
    """Return the spacing of the coarsest grid that holds every tap of two convolutions in a row."""

    def along(axis: int) -> int:
        steps = []
        if kernel1[axis] > 1:
            steps.append(dilation1[axis])
        if kernel2[axis] > 1:
            steps.append(dilation2[axis] * stride1[axis])
        return math.gcd(*steps) if steps else 1

    return along(0), along(1)


def _check_pair(first: nn.Conv2d, second: nn.Conv2d) -> None:
    for which, layer in (("first", first), ("second", second)):
        if type(layer) is not nn.Conv2d:
            _refuse(
                f"the {which} is a {type(layer).__name__}, not exactly an nn.Conv2d, and may "
                "compute something else"
            )
    if first.out_channels != second.in_channels:
        _refuse(
            f"the first has {first.out_channels} output channels and the second takes "
            f"{second.in_channels}"
        )
    if first.weight.dtype != second.weight.dtype or first.weight.device != second.weight.device:
        _refuse(
            f"the first is {first.weight.dtype} on {first.weight.device} and the second "
            f"{second.weight.dtype} on {second.weight.device}; convert one"
        )


def _combined_padding(first: nn.Conv2d, second: nn.Conv2d) -> tuple[tuple[Pair, Pair], str]:
    """Padding before and after each axis and its mode, or refuse."""
    sides1, sides2 = padding_sides(first), padding_sides(second)
    pads1, pads2 = any(map(any, sides1)), any(map(any, sides2))
    if pads1 and pads2 and first.padding_mode != second.padding_mode:
        _refuse(
            f"their padding modes differ ({first.padding_mode!r} and {second.padding_mode!r}) and "
            "both pad"
        )
    mode = first.padding_mode if pads1 else second.padding_mode
    for axis, name in enumerate(_AXES):
        if not any(sides2[axis]):
            continue
        kernel, stride = first.weight.shape[2 + axis], _pair(first.stride)[axis]
        if kernel > 1:
            _refuse(
                f"the second pads the {name} by {sides2[axis]} after the first's kernel of "
                f"{kernel}, so it reads padding where a single convolution reads values; move the "
                "padding to the first"
            )
        if mode != "zeros" and stride > 1:
            _refuse(
                f"the second pads the {name} with {mode!r} after a stride of {stride}, which "
                "repeats other values than padding the input does"
            )
        if mode in ("reflect", "circular") and any(sides1[axis]):
            _refuse(f"both pad the {name} with {mode!r}, which is not one larger padding")
    if pads2 and mode == "zeros" and first.bias is not None:
        _refuse(
            "the first has a bias and the second pads with zeros, so the bias is missing at the "
            "border; move the padding to the first"
        )
    along = [
        (a[0] + b[0] * s, a[1] + b[1] * s)
        for a, b, s in zip(sides1, sides2, _pair(first.stride), strict=True)
    ]
    return (along[0], along[1]), mode if pads1 or pads2 else "zeros"


def padding_sides(layer: nn.Conv2d) -> tuple[Pair, Pair]:
    """Padding of a convolution as ``((top, bottom), (left, right))``, "same" resolved."""
    if isinstance(layer.padding, str):
        return resolve_padding(layer.padding, spatial_size(layer.weight), _pair(layer.dilation))
    return resolve_padding(_pair(layer.padding), spatial_size(layer.weight), _pair(layer.dilation))


def resolve_padding(padding: Pair | str, kernel: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    """Return ``((top, bottom), (left, right))``; "same" puts the odd one last, as torch does."""
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        top, left = (t // 2 for t in totals)
        return (top, totals[0] - top), (left, totals[1] - left)
    if isinstance(padding, str):
        return (0, 0), (0, 0)
    return (padding[0], padding[0]), (padding[1], padding[1])


def _as_padding(sides: tuple[Pair, Pair], kernel: Pair, stride: Pair, dilation: Pair) -> Pair | str:
    """Padding as `nn.Conv2d` takes it, or refuse."""
    if all(before == after for before, after in sides):
        return sides[0][0], sides[1][0]
    if stride != (1, 1) or sides != resolve_padding("same", kernel, dilation):
        _refuse(
            f"the padding {sides} (top and bottom, left and right) is unequal, which one nn.Conv2d "
            f"of kernel {kernel} and stride {stride} cannot have"
        )
    return "same"


def _pair(value: tuple[int, ...] | str) -> Pair:
    assert not isinstance(value, str)
    return value[0], value[1]


def _refuse(reason: str) -> NoReturn:
    raise UnsupportedLayer(f"The two convolutions cannot be combined exactly: {reason}.")
