"""Running the dense and the compressed network side by side, one node of the graph at a time.

All batches stand at the same node, so that a layer can be fitted to what the compressed network
really feeds it and the pass goes on from there: refitting every layer costs one pass in all. What
is still needed of each batch waits in a `compress.fit.frontier.Frontier`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from compress.fit.frontier import Environment, Pair
from compress.running.structure import cloned

# In-place functions: their first argument must not be shared between the two networks.
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


class Lockstep:
    """The two networks over one graph: the interpreter of both.

    Args:
        model: The dense network.
        graph: Its graph.

    Attributes:
        modules: The dense network's modules by the qualified name that the graph calls them by.
        chains: What stands in their place in the compressed network, by the same names; may change
            between segments.
        nodes: The graph's nodes, in order.
        result: Index of the one that gives all outputs, as a tuple.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.chains: dict[str, nn.Module] = {}
        self.nodes = list(graph.nodes)
        self.result = next(i for i, node in enumerate(self.nodes) if node.op == "output")
        self.last_use: dict[fx.Node, list[str]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(self.nodes):
            for source in node.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    self.last_use.setdefault(node, []).append(source.name)

    def run(self, environment: Environment, nodes: Iterable[fx.Node]) -> None:
        """Advance a batch through some nodes, dropping values after their last use."""
        for node in nodes:
            environment[node.name] = self.execute(node, environment)
            for name in self.last_use.get(node, ()):
                environment.pop(name, None)

    def execute(self, node: fx.Node, environment: Environment) -> Pair:
        """Compute one node in both networks, once where they agree."""
        if node.op == "get_attr":
            value = self.attribute(node)
            return Pair(value, value)
        if node.op == "output":
            return Pair(None, None)
        same = all(environment[n.name].same for n in node.all_input_nodes)
        replaced = node.op == "call_module" and str(node.target) in self.chains

        def side(name: str, modules: Mapping[str, nn.Module]) -> Any:
            def value(source: fx.Node) -> Any:
                pair = environment[source.name]
                found = getattr(pair, name)
                # Where the networks part, neither may change in place what both still hold.
                shared = pair.same and (replaced or not same) and isinstance(found, Tensor)
                return found.clone() if shared and _changes_input(node, modules) else found

            return call_node(node, value, modules)

        dense = side("dense", self.modules)
        if same and not replaced:
            return Pair(dense, dense)
        return Pair(dense, side("compressed", {**self.modules, **self.chains}))

    def attribute(self, node: fx.Node) -> Any:
        """Return what a node reads from the dense network, such as a parameter."""
        return operator.attrgetter(str(node.target))(self.model)

    def across(
        self, value: Any, start: int, end: int, numbers: dict[str, Any], *, compressed: bool
    ) -> Any:
        """Take a value through only one network, over nodes that nothing else leads into.

        Args:
            value: What node ``start`` gave.
            start: Index of a node that carries everything on.
            end: Index of a later one, or the same.
            numbers: Of nodes before that gave numbers, such as sizes, what they gave in this
                network for these images; those on the way are added.
            compressed: Which of the two networks.

        Returns:
            What node ``end`` gives.
        """
        if start == end:
            return value
        modules = {**self.modules, **self.chains} if compressed else self.modules
        # A copy, since the first node may change it in place.
        values: dict[str, Any] = {**numbers, self.nodes[start].name: cloned(value)}
        for node in self.nodes[start + 1 : end + 1]:
            if node.op == "get_attr":
                values[node.name] = self.attribute(node)
            elif node.op == "output":
                values[node.name] = fx.node.map_arg(node.args[0], lambda n: values[n.name])
            else:
                values[node.name] = call_node(node, lambda source: values[source.name], modules)
            if holds_numbers(values[node.name]):
                numbers[node.name] = values[node.name]
        for buffer in self.model.buffers():
            if buffer.grad_fn is not None:  # what was written into it must not hold these images
                buffer.detach_()
        return values[self.nodes[end].name]


def holds_numbers(value: Any) -> bool:
    """Whether a value is made of numbers, sizes and the like alone, without any tensor."""
    if isinstance(value, tuple | list):
        return all(holds_numbers(part) for part in value)
    return value is None or isinstance(value, int | float | str | torch.dtype | torch.device)


def call_node(
    node: fx.Node, value: Callable[[fx.Node], Any], modules: Mapping[str, nn.Module]
) -> Any:
    """Compute one node from the values of those that it reads."""
    args = fx.node.map_arg(node.args, value)
    kwargs = fx.node.map_arg(node.kwargs, value)
    if node.op == "call_module":
        return modules[str(node.target)](*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    function: Callable[..., Any] = node.target  # type: ignore[assignment]  # not a str here
    return function(*args, **kwargs)


def _changes_input(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return node.target in _IN_PLACE or bool(node.kwargs.get("inplace"))


def residual_partner(
    node: fx.Node, done: set[fx.Node], modules: dict[str, nn.Module]
) -> fx.Node | None:
    """Return what is added to a layer's output, where that is computed already.

    ``y + shortcut``: fitting ``y`` to the dense sum less the compressed shortcut mends what the
    shortcut carries past the layer. Only an addition that alone reads the output counts; dropout
    and identities between are looked through.
    """
    current = node
    while len(current.users) == 1:
        user = next(iter(current.users))
        added = user.op == "call_function" and user.target in (
            operator.add, operator.iadd, torch.add,
        )  # fmt: skip
        added = added or (user.op == "call_method" and user.target in ("add", "add_"))
        if added:
            others = [a for a in user.args[:2] if isinstance(a, fx.Node) and a is not current]
            plain = not user.kwargs and len(user.args) == 2
            return others[0] if plain and len(others) == 1 and others[0] in done else None
        if user.op != "call_module" or not isinstance(
            modules[str(user.target)], nn.Identity | nn.Dropout
        ):
            return None
        current = user
    return None
