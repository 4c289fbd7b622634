"""The shape of a chain of linear layers, checked once, and the single layer that it equals."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from compress.errors import UnsupportedLayer
from compress.linalg.kernels import Pair, compose_kernels, dirac, push_bias, spatial_size


@dataclass(frozen=True)
class Chain:
    """A chain of convolutions with one stride, padding and dilation; a linear layer is 1x1.

    Node 0 is the input, node m the output of sublayer m, its residual branches added.

    Attributes:
        channels: Channels of each node, ``depth + 1`` numbers.
        kernels: ``(k_h, k_w)`` of each sublayer.
        groups: Groups of every sublayer.
        intervals: Residual intervals that are reached, ascending.
    """

    channels: tuple[int, ...]
    kernels: tuple[Pair, ...]
    groups: int = 1
    intervals: tuple[int, ...] = ()

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
    residual: bool,
    residual_intervals: int | Sequence[int],
) -> Chain:
    """Check the options of an over-parameterised layer and return its chain.

    Args:
        name: Class of the layer, for messages.
        in_channels: Channels or features in.
        out_channels: Channels or features out.
        kernels: Kernel of each sublayer.
        width: Hidden channels as a multiple of ``out_channels``.
        groups: Groups of every sublayer.
        residual: Whether there are residual branches.
        residual_intervals: Their intervals; -1 is the whole depth.

    Raises:
        ValueError: A size, width, depth or interval that makes no chain.
        UnsupportedLayer: A residual branch over an even kernel.
    """
    depth = len(kernels)
    if depth < 1:
        raise ValueError(f"{name} has depth {depth}; a chain has at least one sublayer.")
    for what, value in (("in", in_channels), ("out", out_channels), ("groups", groups)):
        if value < 1:
            raise ValueError(f"{name} has {what} = {value}; it must be at least 1.")
    for kernel in kernels:
        if min(kernel) < 1:
            raise ValueError(f"{name} has a kernel of {kernel}; kernels must be at least 1.")
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
    intervals = _intervals(name, depth, residual_intervals) if residual else ()
    chain = Chain(sizes, kernels, groups, intervals)
    _check_residual(name, chain)
    return chain


def _intervals(name: str, depth: int, given: int | Sequence[int]) -> tuple[int, ...]:
    """Intervals that are reached, ascending; -1 is the depth; warn of those that are not."""
    asked = (given,) if isinstance(given, int) else tuple(given)
    for interval in asked:
        if interval < 1 and interval != -1:
            raise ValueError(
                f"{name} has a residual interval of {interval}; intervals are positive, or -1 for "
                "the whole depth."
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
    for node in range(1, chain.depth + 1):
        for source in chain.sources(node):
            span = chain.span(source, node)
            if any(k % 2 == 0 for k in span):
                raise UnsupportedLayer(
                    f"{name}: the residual branch from node {source} to node {node} spans a "
                    f"{span[0]}x{span[1]} kernel, which has no centre for the identity; use odd "
                    "kernels there or other residual_intervals."
                )


def compose_chain(
    chain: Chain, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Return the kernel and bias of the one layer that equals the chain.

    With the composite kernels ``T_0 = identity``, ``T_m = W_m * T_{m-1} + sum over the residual
    sources s of node m of T_s``, each ``T_s`` centred in the larger kernel.

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
            kernel = kernel + _centred(chain, kernels[source], spatial_size(kernel), weight)
            added = shifts[source]
            if added is not None:
                shift = added if shift is None else shift + added
        kernels.append(kernel)
        shifts.append(shift)
    whole = kernels[-1]
    assert whole is not None
    return whole, shifts[-1]


def _centred(chain: Chain, kernel: Tensor | None, size: Pair, like: Tensor) -> Tensor:
    """``kernel`` (None: the identity) in the middle of a kernel of ``size``."""
    if kernel is None:
        return dirac(
            chain.channels[0], size, groups=chain.groups, dtype=like.dtype, device=like.device
        )
    height, width = ((s - k) // 2 for s, k in zip(size, spatial_size(kernel), strict=True))
    return F.pad(kernel, (width, width, height, height))
