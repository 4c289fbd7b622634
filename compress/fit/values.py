"""What the nodes of a graph give: how many positions, along which axis channels, for which images.

Which axis counts channels is told by the layers that make or read a value: their last axis if they
are linear, that before the positions if they convolve. It holds as well for what other operations
make of it as long as they leave its shape alone: sums with a shortcut, norms, activations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from compress.fit.cuts import NUMBERS
from compress.layers import kind_of

# May give the same numbers in another order, although the shape is the same.
_MOVES = frozenset({
    "T", "flatten", "getattr", "mT", "moveaxis", "movedim", "permute", "reshape", "rot90",
    "swapaxes", "swapdims", "t", "transpose", "unflatten", "view",
})  # fmt: skip


@dataclass(frozen=True)
class Value:
    """What a node gives for a batch.

    Attributes:
        shape: Of a tensor; None of anything else.
        axis: That of the channels; None where there is no telling.
        positions: How many an image has for one channel; 0 of what is not a tensor with channels,
            and `NUMBERS` of numbers.
        by_image: Whether the first axis counts images, each perhaps several times in a row.
        images: How many the batch holds.
    """

    shape: torch.Size | None = None
    axis: int | None = None
    positions: int = 0
    by_image: bool = False
    images: int = 0

    @classmethod
    def of(
        cls, shape: torch.Size | None, axis: int | None, images: int, *, by_image: bool
    ) -> Value:
        """What a node gives for so many images."""
        if shape is None or len(shape) < 2:
            return cls(shape, by_image=by_image, images=images)
        if axis is None and len(shape) == 2:
            axis = 1
        around = list(shape)
        around.pop(1 if axis is None else axis)
        return cls(shape, axis, math.prod(around) // images, by_image, images)

    @classmethod
    def numbers(cls) -> Value:
        """What holds no tensors."""
        return cls(positions=NUMBERS)

    @property
    def bytes(self) -> int:
        """How many an image takes in single precision."""
        return 4 * math.prod(self.shape) // self.images if self.shape and self.images else 0

    def rows(self, value: Tensor) -> Tensor:
        """Such a value, perhaps of fewer channels, as ``[rows, channels]``.

        Raises:
            ValueError: Nothing tells where its channels are.
        """
        if self.axis is None:
            raise ValueError("nothing tells which axis of the value counts channels")
        return value.movedim(self.axis, -1).flatten(0, -2)

    def behind_layers(self, kinds: Iterable[str]) -> Value:
        """What comes of layers of such kinds, and of nothing else.

        If they all convolve in as many dimensions as it has, its channels lie where theirs do,
        whatever lies between: a concatenation of parts, say.
        """
        dimensions = 0 if self.shape is None else len(self.shape) - 2
        if self.axis is None and {_positions_behind(kind) for kind in kinds} == {dimensions}:
            return replace(self, axis=1)
        return self


def channel_axes(
    nodes: Sequence[fx.Node],
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, torch.Size],
) -> dict[str, int]:
    """The axes that count channels, by node, where all that is told of one agrees.

    Args:
        nodes: Those of a graph, in order.
        modules: What they call, by qualified name.
        shapes: Of the tensors that they give, by node.
    """
    told: dict[str, set[int]] = defaultdict(set)

    def tell(name: str, behind: int) -> None:
        if name in shapes:
            told[name].add(len(shapes[name]) - 1 - behind)

    kept: list[tuple[fx.Node, fx.Node]] = []
    for node in nodes:
        kind = kind_of(modules[str(node.target)]) if node.op == "call_module" else None
        behind = None if kind is None else _positions_behind(kind.name)
        if behind is not None:
            tell(node.name, behind)
            for source in node.all_input_nodes:
                tell(source.name, behind)
        elif not _moves(node):
            same = (n for n in node.all_input_nodes if shapes.get(n.name) == shapes.get(node.name))
            kept.extend((source, node) for source in same if node.name in shapes)
    for source, node in kept:
        told[node.name] |= told[source.name]
    for source, node in reversed(kept):
        told[source.name] |= told[node.name]
    agreed = {name: next(iter(axes)) for name, axes in told.items() if len(axes) == 1}
    return {name: axis for name, axis in agreed.items() if axis > 0}


def _positions_behind(kind: str) -> int:
    """How many axes of positions a layer has behind its channels."""
    return next((n for n in (1, 2, 3) if kind.endswith(f"{n}d")), 0)


def _moves(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op != "call_module" and name in _MOVES
