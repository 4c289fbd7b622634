"""Where a single tensor carries everything on: between the blocks of most networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx, nn

# In place of a number of positions: a node gives numbers alone, such as a size, which are not part
# of what is carried on.
NUMBERS = -1


@dataclass(frozen=True)
class Segment:
    """Nodes after ``start`` up to ``end`` (indices into the graph), the only ways in and out."""

    start: int
    end: int
    layers: tuple[str, ...]


def find_segments(
    graph: fx.Graph, model: nn.Module, refitted: Mapping[str, str], positions: Sequence[int]
) -> list[Segment]:
    """Cut a graph into stretches of at least two layers that may change.

    A stretch reaches on through what has no parameters, to where the next layer reads, but not
    over a pooling: before it, every position tells of an error. It has a single layer only where
    the pooling leaves one position an image.

    Args:
        graph: The network's.
        model: The network.
        refitted: From the qualified names that the graph calls layers by to their names.
        positions: Of each node's value, how many an image has for one channel; `NUMBERS` of what
            holds no tensors.
    """
    nodes, modules = list(graph.nodes), dict(model.named_modules(remove_duplicate=False))

    def fixed(node: fx.Node) -> bool:
        if node.op == "call_module":
            return not any(True for _ in modules[str(node.target)].parameters())
        return node.op not in ("get_attr", "output")

    # What carries everything on may be a tuple, as a split gives: its parts are not one value.
    carried = [node for node, count in zip(nodes, positions, strict=True) if count != NUMBERS]
    cuts = [cut for cut in _cuts(nodes, set(carried)) if positions[cut] > 0]
    segments = []
    start = cuts[0] if cuts else 0
    for cut, following in pairwise([*cuts[1:], len(nodes)]):
        inside = [str(n.target) for n in nodes[start + 1 : cut + 1] if n.op == "call_module"]
        layers = tuple(dict.fromkeys(refitted[t] for t in inside if t in refitted))
        if not layers:
            start = cut
            continue
        passes = all(fixed(n) for n in nodes[cut + 1 : following + 1])
        ahead = positions[following] if passes else -1
        least = 1 if positions[cut] > 1 == ahead else 2
        if len(layers) >= least and ahead != positions[cut]:
            segments.append(Segment(start, cut, layers))
            start = cut
    return segments


def join(segments: Sequence[Segment], most: int, positions: Sequence[int]) -> list[Segment]:
    """Join up to ``most`` stretches that follow each other directly; single layers are left out.

    None goes from many positions to one an image, and the last of many positions stays by itself:
    what few positions ask of many weights is soon fitted by heart.
    """
    joined: list[Segment] = []
    count = 0
    spread = [segment for segment in segments if positions[segment.end] > 1]
    for segment in segments:
        last = joined[-1] if joined else segment
        alone = segment in spread[-1:] and len(segment.layers) > 1
        alone = alone or positions[last.end] > 1 == positions[segment.end]
        if last.end == segment.start and count < most and not alone:
            joined[-1] = Segment(last.start, segment.end, last.layers + segment.layers)
            count += 1
        else:
            joined.append(segment)
            count = 1
    return [segment for segment in joined if len(segment.layers) > 1]


def _cuts(nodes: list[fx.Node], carried: set[fx.Node]) -> Iterator[int]:
    """Indices of the nodes whose value alone is needed by what comes after them."""
    place = {node: i for i, node in enumerate(nodes)}
    needed: set[fx.Node] = set()
    for i, node in enumerate(nodes):
        if node in carried:
            needed.add(node)
        needed = {n for n in needed if any(place[user] > i for user in n.users)}
        if needed == {node}:
            yield i
