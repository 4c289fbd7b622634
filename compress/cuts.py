"""Where a single tensor carries everything on: between the blocks of most networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx, nn


@dataclass(frozen=True)
class Segment:
    """Nodes after ``start`` up to ``end`` (indices into the graph), the only ways in and out."""

    start: int
    end: int
    layers: tuple[str, ...]


def find_segments(graph: fx.Graph, model: nn.Module, replaced: Mapping[str, str]) -> list[Segment]:
    """Cut a graph into stretches of at least two replaced layers.

    A stretch reaches on through what has no parameters, to where the next layer reads.

    Args:
        graph: The network's.
        model: The network.
        replaced: From the qualified names that the graph calls layers by to their names.
    """
    nodes, modules = list(graph.nodes), dict(model.named_modules(remove_duplicate=False))

    def fixed(node: fx.Node) -> bool:
        if node.op == "call_module":
            return not any(True for _ in modules[str(node.target)].parameters())
        return node.op not in ("get_attr", "output")

    cuts = list(_cuts(nodes))
    segments = []
    start = cuts[0] if cuts else 0
    for cut, following in zip(cuts[1:], [*cuts[2:], len(nodes)], strict=True):
        inside = [str(n.target) for n in nodes[start + 1 : cut + 1] if n.op == "call_module"]
        layers = tuple(dict.fromkeys(replaced[t] for t in inside if t in replaced))
        if not layers:
            start = cut
        elif len(layers) > 1 and not all(fixed(n) for n in nodes[cut + 1 : following + 1]):
            segments.append(Segment(start, cut, layers))
            start = cut
    return segments


def _cuts(nodes: list[fx.Node]) -> Iterator[int]:
    """Indices of the nodes whose value alone is needed by what comes after them."""
    place = {node: i for i, node in enumerate(nodes)}
    needed: set[fx.Node] = set()
    for i, node in enumerate(nodes):
        needed.add(node)
        needed = {n for n in needed if any(place[user] > i for user in n.users)}
        if needed == {node}:
            yield i
