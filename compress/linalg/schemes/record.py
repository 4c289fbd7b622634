"""What a scheme is: how the chain of narrower layers that stands for one layer is put together.

A scheme splits the layer's patch index ``(channel, row, column)`` (in three dimensions
``(channel, depth, row, column)``) into an *inner* part, which the first factor ``A [r, inner]``
reads, and an *outer* part, the taps of the last factor ``B [out, r, outer]``.
Everything else follows from that: the chain's layers, its full ranks, and where the weights go.

Nothing here imports torch, so that the command line can name the schemes without it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from compress.linalg.geometry import Geometry, Sizes

Ranks = tuple[int, ...]
# The covariance of longer patches would take more than half a gigabyte a layer, and its
# factorisations minutes; closed forms need only that of the outputs.
LONGEST_PATCH = 8192
# The axes of a patch, in the order in which a weight ``[groups, out, in, *kernel]`` has them: the
# channel, the first axis of the kernel, and all others, which stay together: rows and columns, or
# the depth and what is left of three dimensions.
CHANNEL, FIRST, REST = 0, 1, 2


def too_long(geometry: Geometry) -> str | None:
    """Return why a layer takes only schemes in closed form, or None where it takes others too."""
    length = geometry.in_features
    if length <= LONGEST_PATCH or math.prod(geometry.kernel_size) == 1:
        return None
    return f"its patches of {length:,} numbers are too long for any scheme but output"


@dataclass(frozen=True)
class Scheme:
    """One way to replace a layer by a chain.

    Attributes:
        name: What it is called on the command line, in plans and in artefacts.
        summary: The chain in a few words.
        inner: The patch axes that the first factor reads, ascending.
        outer: The patch axes that the last factor reads, ascending; empty where it is pointwise.
        cored: Whether the last factor is itself of low rank (Tucker-2): a third layer and a
            second rank.
        unsuited: Why it is of no use for a layer's geometry, or None where it is.
    """

    name: str
    summary: str
    inner: tuple[int, ...]
    outer: tuple[int, ...]
    cored: bool
    unsuited: Callable[[Geometry], str | None]

    @property
    def closed_form(self) -> bool:
        """Whether the best factors have a closed form, for which statistics of outputs suffice."""
        return not self.outer

    @property
    def rank_count(self) -> int:
        """How many ranks it takes."""
        return 2 if self.cored else 1

    def unavailable(self, geometry: Geometry) -> str | None:
        """Return why the scheme cannot stand for this layer exactly, or None where it can."""
        found = (None if self.closed_form else too_long(geometry)) or self.unsuited(geometry)
        if found is None and min(self.full_ranks(geometry)) < 2:
            return "its weight has rank 1 already"
        return found

    def full_ranks(self, geometry: Geometry) -> Ranks:
        """Return the ranks (per group) at which the scheme is the identity on every weight."""
        inner, outer = self._size(geometry, self.inner), self._size(geometry, self.outer)
        first = min(inner, geometry.out_features * outer)
        return (first, min(geometry.out_features, inner * outer)) if self.cored else (first,)

    def stages(self, geometry: Geometry, ranks: Ranks) -> tuple[Geometry, ...]:
        """Return the geometry of every layer of the chain, first to last."""
        wide = [r * geometry.groups for r in ranks]
        inputs, outputs = geometry.in_channels, geometry.out_channels
        first = _stage(geometry, self.inner, inputs, wide[0])
        if not self.cored:
            return first, _stage(geometry, self.outer, wide[0], outputs)
        core = _stage(geometry, self.outer, wide[0], wide[1])
        return first, core, _stage(geometry, (), wide[1], outputs)

    def split_weight(self, weight: Tensor) -> Tensor:
        """Reorder a weight ``[groups, out, in, *kernel]`` to ``[groups, out, outer, inner]``."""
        groups, out, *sizes = weight.shape
        parts = [_expanded(axes, len(sizes)) for axes in (self.outer, self.inner)]
        outer, inner = (math.prod(sizes[a] for a in axes) for axes in parts)
        order = (2 + a for a in itertools.chain(*parts))
        return weight.permute(0, 1, *order).reshape(groups, out, outer, inner)

    def split_covariance(self, covariance: Tensor, geometry: Geometry) -> Tensor:
        """Reorder ``[groups, d, d]`` over patches to ``[groups, outer, inner, outer, inner]``."""
        groups, sizes = covariance.shape[0], self._sizes(geometry)
        order = self._order(geometry)
        outer, inner = (self._size(geometry, axes) for axes in (self.outer, self.inner))
        full = covariance.reshape(groups, *sizes, *sizes)
        second = 1 + len(sizes)
        ordered = full.permute(0, *(1 + a for a in order), *(second + a for a in order))
        return ordered.reshape(groups, outer, inner, outer, inner)

    def stage_weights(
        self, geometry: Geometry, first: Tensor, last: Tensor, up: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Turn factors into the layers' weights ``[groups, out, in, *kernel]``.

        Args:
            geometry: The layer that the chain replaces.
            first: ``A [groups, r, inner]``.
            last: ``B [groups, out, r, outer]``; for a cored scheme the core, with ``out = r2``.
            up: For a cored scheme, the last projection ``[groups, out, r2]``.

        Raises:
            ValueError: The scheme is cored and there is no ``up``.
        """
        groups, rank, _ = first.shape
        channels, *taps = self._sizes(geometry)
        kernels = [
            tuple(
                k if axis in _expanded(axes, len(taps) + 1) else 1 for axis, k in enumerate(taps, 1)
            )
            for axes in (self.inner, self.outer)
        ]
        weights = (
            first.reshape(groups, rank, channels, *kernels[0]),
            last.reshape(groups, last.shape[1], rank, *kernels[1]),
        )
        if not self.cored:
            return weights
        if up is None:
            raise ValueError(f"{self.name} needs its last projection")
        return *weights, up.reshape(*up.shape, *(1 for _ in taps))

    def joined(self, geometry: Geometry, full: Tensor) -> Tensor:
        """Reorder ``Ŵ [groups, out, outer, inner]`` to rows of patches, ``[groups, out, d]``."""
        sizes, order = self._sizes(geometry), self._order(geometry)
        apart = full.reshape(*full.shape[:2], *(sizes[a] for a in order))
        return apart.permute(0, 1, *(2 + order.index(a) for a in range(len(sizes)))).flatten(2)

    @staticmethod
    def _sizes(geometry: Geometry) -> tuple[int, ...]:
        return geometry.in_channels // geometry.groups, *geometry.kernel_size

    def _order(self, geometry: Geometry) -> tuple[int, ...]:
        """The axes of a patch, the outer ones first."""
        count = len(self._sizes(geometry))
        return _expanded(self.outer, count) + _expanded(self.inner, count)

    def _size(self, geometry: Geometry, axes: tuple[int, ...]) -> int:
        sizes = self._sizes(geometry)
        return math.prod(sizes[axis] for axis in _expanded(axes, len(sizes)))


def _expanded(axes: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The axes of a patch that has ``count`` of them, `REST` written out."""
    rest = tuple(range(REST, count)) if REST in axes else ()
    return tuple(axis for axis in axes if axis != REST) + rest


def _stage(geometry: Geometry, axes: tuple[int, ...], inputs: int, outputs: int) -> Geometry:
    """Return the layer that acts along some axes of the kernel and is pointwise elsewhere."""
    first, rest = FIRST in axes, REST in axes
    if first and rest:
        return geometry.with_(in_channels=inputs, out_channels=outputs)

    def only(sizes: Sizes, otherwise: int) -> Sizes:
        kept = (first, *(rest for _ in sizes[1:]))
        return tuple(size if keep else otherwise for size, keep in zip(sizes, kept, strict=True))

    plain = not (first or rest)
    padding = geometry.padding
    none = tuple(0 for _ in geometry.kernel_size)
    amounts = none if isinstance(padding, str) else padding
    return geometry.with_(
        kind=geometry.kind.replace("_transpose", "") if plain else geometry.kind,
        in_channels=inputs,
        out_channels=outputs,
        kernel_size=only(geometry.kernel_size, 1),
        stride=only(geometry.stride, 1),
        padding=padding if isinstance(padding, str) and not plain else only(amounts, 0),
        dilation=only(geometry.dilation, 1),
        padding_mode="zeros" if plain else geometry.padding_mode,
        output_padding=only(geometry.output_padding, 0),
    )


def chain_macs(chain: tuple[Geometry, ...], size: Sizes) -> int:
    """Multiply-accumulates of a chain for one input whose axes have ``size``."""
    total = 0
    for stage in chain:
        total += stage.macs(size)
        size = stage.output_size(size)
    return total


def chain_params(chain: tuple[Geometry, ...], *, biased: bool = True) -> int:
    """Number of parameters of a chain in which only the last layer has a bias."""
    return sum(stage.weight_numel for stage in chain) + (chain[-1].out_channels if biased else 0)
