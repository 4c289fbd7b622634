"""The shape of a chain of linear layers, checked once, and the single layer that it equals."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.linalg.kernels import Pair, compose_kernels, push_bias, spatial_size


@dataclass(frozen=True)
class Chain:
    """A chain of convolutions with one stride, padding and dilation; a linear layer is 1x1.

    Node 0 is the input, node m the output of sublayer m, its residual branches added.

    Attributes:
        channels: Channels of each node, ``depth + 1`` numbers.
        kernels: ``(k_h, k_w)`` of each sublayer.
        groups: Groups of every sublayer.
        intervals: Residual intervals that are reached, ascending.
        early: Whether the identity over an even kernel is the tap before the middle, which suits
            padding that puts the odd one last, and not the one after it.
    """

    channels: tuple[int, ...]
    kernels: tuple[Pair, ...]
    groups: int = 1
    intervals: tuple[int, ...] = ()
    early: bool = False

    @property
    def depth(self) -> int:
        """Number of sublayers."""
        return len(self.kernels)

    @property
    def kernel_size(self) -> Pair:
        """Kernel of the whole chain."""
        return self.span(0, self.depth)

    def span(self, start: int, end: int) -> Pair:
        """Kernel of the sublayers after node ``start`` up to node ``end``."""
        parts = self.kernels[start:end]
        return tuple(sum(k[axis] - 1 for k in parts) + 1 for axis in (0, 1))  # type: ignore[return-value]  # two axes

    def middle(self, size: Pair) -> Pair:
        """Tap of a kernel of ``size`` that is the identity, as `torch.nn.init.dirac_` puts it."""
        height, width = size
        return ((height - self.early) // 2, (width - self.early) // 2)

    def identity(self, size: Pair, like: Tensor) -> Tensor:
        """Kernel ``[c, c / groups, k_h, k_w]`` of the identity on the input's channels."""
        channels, groups = self.channels[0], self.groups
        eye = torch.eye(channels // groups, dtype=like.dtype, device=like.device)
        return self.placed(eye[:, :, None, None].repeat(groups, 1, 1, 1), size)

    def placed(self, kernel: Tensor, size: Pair) -> Tensor:
        """``kernel`` inside a kernel of ``size``, the identity after or before it."""
        spare = (size[0] - kernel.shape[2], size[1] - kernel.shape[3])
        top, left = self.middle((spare[0] + 1, spare[1] + 1))
        return F.pad(kernel, (left, spare[1] - left, top, spare[0] - top))

    def sources(self, node: int) -> tuple[int, ...]:
        """Nodes whose values are added to ``node``."""
        return tuple(node - n for n in self.intervals if node % n == 0)


def make_chain(
    name: str,
    in_channels: int,
    out_channels: int,
    kernels: tuple[Pair, ...],
    *,
    width: float,
    groups: int,
    residual_intervals: int | Sequence[int] | None,
    early: bool = False,
) -> Chain:
    """Check the options of an over-parameterised layer and return its chain.

    Args:
        name: Class of the layer, for messages.
        in_channels: Channels or features in.
        out_channels: Channels or features out.
        kernels: Kernel of each sublayer.
        width: Hidden channels as a multiple of ``out_channels``.
        groups: Groups of every sublayer.
        residual_intervals: Intervals of the residual branches, -1 the whole depth; None for none.
        early: As in `Chain`.

    Raises:
        ValueError: A size, width, depth or interval that makes no chain.
    """
    depth = len(kernels)
    if depth < 1:
        raise ValueError(f"{name} has depth {depth}; a chain has at least one sublayer.")
    if isinstance(width, bool):
        raise ValueError(f"{name} has width={width}; it is a number. Give bias= by name.")
    hidden = int(out_channels * width)
    if depth > 1 and hidden < 1:
        raise ValueError(
            f"{name} with width={width} has int({out_channels} * {width}) = {hidden} hidden "
            f"channels; it needs a width of at least {1 / out_channels:.3g}."
        )
    sizes = (in_channels, *[hidden] * (depth - 1), out_channels)
    for size in sizes:
        if size % groups:
            raise ValueError(
                f"{name} has groups={groups}, which do not divide its {size} channels (in, hidden, "
                f"out: {sizes[0]}, {hidden}, {sizes[-1]}); change the width or the groups."
            )
    intervals = () if residual_intervals is None else _intervals(name, depth, residual_intervals)
    chain = Chain(sizes, kernels, groups, intervals, early)
    _check_residual(name, chain)
    return chain


def _intervals(name: str, depth: int, given: int | Sequence[int]) -> tuple[int, ...]:
    """Intervals that are reached, ascending; -1 is the depth; warn of those that are not."""
    asked = tuple(whole(n, name, "residual_intervals", -1) for n in as_sequence(given))
    if 0 in asked:
        raise ValueError(
            f"{name} has a residual interval of 0; intervals are positive, or -1 for the whole "
            "depth."
        )
    unreached = sorted({n for n in asked if n > depth})
    if unreached:
        warnings.warn(
            f"{name}: the residual intervals {unreached} are longer than its depth {depth} and "
            "never reached; they add no branch.",
            UserWarning,
            stacklevel=4,
        )
    return tuple(sorted({depth if n == -1 else n for n in asked if n <= depth}))


def _check_residual(name: str, chain: Chain) -> None:
    if not chain.intervals:
        return
    first, hidden, last = chain.channels[0], chain.channels[1], chain.channels[-1]
    if first != last:
        raise ValueError(
            f"{name} with residual=True has {first} channels in and {last} out; a residual branch "
            "is an identity and needs as many out as in."
        )
    if hidden != first and chain.intervals != (chain.depth,):
        raise ValueError(
            f"{name} has {hidden} hidden channels and {first} in; the residual intervals "
            f"{list(chain.intervals)} end inside the chain and need them equal. Use width=1 or "
            "residual_intervals=-1."
        )


def compose_chain(
    chain: Chain, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Return the kernel and bias of the one layer that equals the chain.

    With the composite kernels ``T_0 = identity``, ``T_m = W_m * T_{m-1} + sum over the residual
    sources s of node m of T_s``, each ``T_s`` in the middle of the larger kernel.

    Args:
        chain: Its shape.
        weights: ``[channels[m], channels[m - 1] / groups, k_h, k_w]`` of each sublayer, BatchNorm
            folded in, in the dtype to compute in.
        biases: ``[channels[m]]`` of each, or None.

    Returns:
        ``[out, in / groups, K_h, K_w]`` and ``[out]`` or None.
    """
    kernels: list[Tensor | None] = [None]  # the identity at node 0 is made where it is added
    shifts: list[Tensor | None] = [None]
    for node, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        below = kernels[-1]
        kernel = weight if below is None else compose_kernels(below, weight, groups=chain.groups)
        shift = push_bias(shifts[-1], weight, bias, groups=chain.groups)
        for source in chain.sources(node):
            below, size = kernels[source], spatial_size(kernel)
            branch = chain.identity(size, weight) if below is None else chain.placed(below, size)
            kernel = kernel + branch
            added = shifts[source]
            if added is not None:
                shift = added if shift is None else shift + added
        kernels.append(kernel)
        shifts.append(shift)
    whole = kernels[-1]
    assert whole is not None
    return whole, shifts[-1]


def as_sequence(value: Any) -> tuple[Any, ...]:
    """Return one number as a sequence of one, and a sequence as it is."""
    try:
        operator.index(value)
    except TypeError:
        return tuple(value) if isinstance(value, Iterable) else (value,)
    return (value,)


def whole(value: Any, name: str, what: str, least: int = 1) -> int:
    """Read a whole number, numpy's too.

    Raises:
        ValueError: A number below ``least``, or anything else (a boolean, a float).
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(
            f"{name} has {what}={value!r}; it takes a whole number of at least {least}."
        )
    return number
