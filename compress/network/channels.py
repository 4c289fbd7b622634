"""Which channels of a network belong together, read from its graph.

A channel is made by the layers that have it among their outputs, passes through operations that
treat every channel by itself (activations, pooling, depthwise convolutions, norms by running
statistics, products with a scale of its own), may be added to channels of other layers, and ends in
the layers that have it among their inputs. It can be taken out of a network only with all of that
together (dependency graphs: Fang et al., "DepGraph: Towards Any Structural Pruning", 2023).

What an operation does to channels is not looked up but tried out: it treats each by itself if some
of the channels give just their part of what all channels give. Operations of the user's own are so
covered as well, and one that names a number of channels, such as a reshape, fails and is left.

Where an operation gives of mixed channels the same mixture of what it gives of them, as a sum or a
mean over positions does and an activation does not, the channels can also be rotated: what lies
between the layers that make and those that read them is linear.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from compress.layers import kind_of
from compress.network.sites import LayerSite
from compress.running.forward import evaluation_mode
from compress.running.modules import is_hooked
from compress.running.structure import concatenated, tensors

# So many channels are mixed with each other to find out whether mixtures of them would do.
MIXED_TOGETHER = 64
# Norms that treat every channel by itself in eval mode, with parameters of each.
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_JOINS = (torch.cat, torch.concat, torch.concatenate)


@dataclass(frozen=True)
class Slot:
    """Where a group's channels lie in one module.

    Attributes:
        name: The module's.
        places: ``[channels, repeats]``: indices among its inputs or outputs; a channel that was
            flattened has several.
    """

    name: str
    places: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are made, changed and read by the same modules.

    Attributes:
        name: That of the first layer that makes them.
        size: How many.
        producers: Layers that have them among their outputs.
        consumers: Layers that have them among their inputs.
        through: Modules with parameters of each: depthwise convolutions and norms.
        linear: Whether mixtures of the channels would do as well as the channels.
    """

    name: str
    size: int
    producers: tuple[Slot, ...]
    consumers: tuple[Slot, ...]
    through: tuple[Slot, ...]
    linear: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all modules that become narrower with it."""
        slots = (*self.producers, *self.through, *self.consumers)
        return tuple(dict.fromkeys(slot.name for slot in slots))


@dataclass(frozen=True)
class NodeChannels:
    """The channels of what a node of the graph gives: ``labels[i]`` is the one at index ``i``."""

    axis: int
    labels: Tensor


@dataclass(frozen=True)
class ChannelMap:
    """All channels of a network.

    Attributes:
        groups: Those that can be cut, in order of execution.
        left: Why the outputs of other layers are left, by layer.
        nodes: Of each node that gives a tensor with channels, by name.
        members: For each group, the labels of its channels.
    """

    groups: tuple[ChannelGroup, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    nodes: Mapping[str, NodeChannels] = field(default_factory=dict)
    members: tuple[Tensor, ...] = ()

    def group(self, name: str) -> ChannelGroup:
        """The group of a name.

        Raises:
            KeyError: There is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)


def read_channels(
    model: nn.Module, graph: fx.Graph | None, sites: Sequence[LayerSite], example: Any
) -> ChannelMap:
    """Find the channels of a network that can be taken out together.

    Args:
        model: The network, norms folded.
        graph: Its graph; without one there is nothing to read.
        sites: Its layers.
        example: One image's inputs ``[1, ...]``.
    """
    if graph is None:
        return ChannelMap()
    reader = _Reader(model, sites)
    with evaluation_mode(model), torch.no_grad():
        reader.read(graph, concatenated([example, example]))
    return reader.found()


class _Classes:
    """Labels, merged where channels turn out to be one; some are fixed, with the reason."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.fixed: dict[int, str] = {}
        # Those that cannot be mixed with others.
        self.apart: set[int] = set()

    def new(self, count: int) -> Tensor:
        """Labels of ``count`` new channels."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def root(self, label: int) -> int:
        """The label that stands for all that were merged."""
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def merge(self, first: Tensor, second: Tensor) -> None:
        """Make the channels at equal indices one."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            low, high = sorted((self.root(a), self.root(b)))
            if low != high:
                self.parent[high] = low
                reason = self.fixed.pop(high, None)
                if reason is not None:
                    self.fixed.setdefault(low, reason)
                if high in self.apart:
                    self.apart.add(low)

    def part(self, labels: Tensor) -> None:
        """Say that these channels cannot be mixed."""
        self.apart.update(self.root(label) for label in labels.tolist())

    def fix(self, labels: Tensor, reason: str) -> None:
        """Leave these channels."""
        for label in labels.tolist():
            self.fixed.setdefault(self.root(label), reason)

    def roots(self, labels: Tensor) -> Tensor:
        """What stands for each label."""
        return torch.tensor([self.root(x) for x in labels.tolist()], dtype=torch.int64)


def _plain(module: nn.Module) -> bool:
    """Whether a layer computes what a plain one does, with a weight of its own."""
    own = module._parameters.get("weight") is not None
    return own and kind_of(module) is not None and not is_hooked(module)


class _Reader:
    """Follows channels through a graph, node by node, while it runs."""

    def __init__(self, model: nn.Module, sites: Sequence[LayerSite]) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names = {alias: site.name for site in sites for alias in site.aliases}
        self.sites = {site.name: site for site in sites}
        self.classes = _Classes()
        self.values: dict[fx.Node, Any] = {}
        self.channels: dict[fx.Node, NodeChannels] = {}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.through: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def read(self, graph: fx.Graph, images: Any) -> None:
        """Run all nodes on some images."""
        last = {source: node for node in graph.nodes for source in node.all_input_nodes}
        for node in graph.nodes:
            if node.op == "output":
                for source in node.all_input_nodes:
                    self._fix(source, "they are an output of the network")
                continue
            value = images if node.op == "placeholder" else self._run(node, self.values)
            self.values[node] = value
            if isinstance(value, Tensor) and node.op not in ("placeholder", "get_attr"):
                self._follow(node, value)
            elif node.op != "placeholder" and tensors(value):
                for source in node.all_input_nodes:
                    self._fix(source, f"{_described(node)} gives several tensors")
            for source in (node, *node.all_input_nodes):
                if last.get(source, node) is node:  # nothing else reads it
                    self.values.pop(source, None)

    def _run(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.model)

        def value(source: fx.Node) -> Any:
            found = values[source]
            # A copy: what is changed in place would change what other nodes read.
            return found.clone() if isinstance(found, Tensor) else found

        args, kwargs = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
        if node.op == "call_module":
            return self.modules[str(node.target)](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]  # not a str here

    def _fix(self, node: fx.Node, reason: str) -> None:
        if node in self.channels:
            self.classes.fix(self.channels[node].labels, reason)

    def _follow(self, node: fx.Node, value: Tensor) -> None:
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            name = self.names.get(str(node.target))
            if name is not None:
                self._layer(node, name, value)
                return
            each = module.num_features if isinstance(module, NORMS) else 0
            if type(module) is nn.PReLU and module.num_parameters > 1:
                each = module.num_parameters
            if each:
                self._each(node, str(node.target), each)
                return
        if node.op == "call_function" and node.target in _JOINS and self._joined(node, value):
            return
        found = self._by_trial(node, value)
        if found is None:
            for source in node.all_input_nodes:
                self._fix(source, f"{_described(node)} does not treat each of them by itself")
            return
        self.channels[node] = found

    def _source(self, node: fx.Node, axis: int, count: int) -> Tensor:
        """The channels that a module reads, made up and fixed where they are not known."""
        known = self.channels.get(node.all_input_nodes[0])
        if known is not None and known.axis == axis and len(known.labels) == count:
            return known.labels
        if known is not None:
            self.classes.fix(known.labels, "another axis is read as channels")
        labels = self.classes.new(count)
        self.classes.fix(labels, "they come from what no layer makes")
        return labels

    def _layer(self, node: fx.Node, name: str, value: Tensor) -> None:
        site = self.sites[name]
        geometry, module = site.geometry, self.modules[name]
        linear = geometry.kind == "linear"
        axis = value.dim() - 1 if linear else 1
        read = self._source(node, axis, geometry.in_channels)
        if _depthwise(site) and _plain(module):
            self._merged(self.through, name, read)
            self.channels[node] = NodeChannels(axis, read)
            return
        made = self.outputs.get(name)
        if made is None:
            made = self.classes.new(geometry.out_channels)
        self._merged(self.inputs, name, read)
        self.outputs[name] = made
        reason = site.skip
        if geometry.groups > 1:
            reason = reason or "it is grouped"
        if reason is not None:
            self.classes.fix(read, f"{name} is left as it is: {reason}")
            self.classes.fix(made, f"{name} is left as it is: {reason}")
        self.channels[node] = NodeChannels(axis, made)

    def _each(self, node: fx.Node, name: str, count: int) -> None:
        axis = 1
        read = self._source(node, axis, count)
        module = self.modules[name]
        if type(module) not in (*NORMS, nn.PReLU):
            self.classes.fix(read, f"{name} is a subclass that may do something else")
        elif is_hooked(module):
            self.classes.fix(read, f"{name} carries forward hooks, which would be lost")
        self._merged(self.through, name, read)
        self.channels[node] = NodeChannels(axis, read)

    def _merged(self, known: dict[str, Tensor], name: str, labels: Tensor) -> None:
        """Note what a module reads; a module that is called again reads the same channels."""
        if name in known:
            self.classes.merge(known[name], labels)
        known[name] = labels
        if known is self.through:
            self.classes.part(labels)

    def _joined(self, node: fx.Node, value: Tensor) -> bool:
        """Whether a concatenation along the channels was followed."""
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not isinstance(parts, list | tuple) or not isinstance(dim, int):
            return False
        axis = dim % value.dim()
        known = [self.channels.get(p) for p in parts if isinstance(p, fx.Node)]
        axes = {k.axis for k in known if k is not None}
        if axes != {axis} or len(known) != len(parts):
            return False
        labels = []
        for part, found in zip(parts, known, strict=True):
            if found is None:
                made = self.classes.new(self.values[part].shape[axis])
                self.classes.fix(made, "they come from what no layer makes")
                labels.append(made)
            else:
                labels.append(found.labels)
        self.channels[node] = NodeChannels(axis, torch.cat(labels))
        return True

    def _by_trial(self, node: fx.Node, value: Tensor) -> NodeChannels | None:
        """The channels of what an operation gives, where it treats each by itself."""
        known = {n: self.channels[n] for n in node.all_input_nodes if n in self.channels}
        counts = {len(found.labels) for found in known.values()} - {1}
        if len(counts) != 1 or value.dim() < 2:
            return None
        (count,) = counts
        for source in [n for n, found in known.items() if len(found.labels) == 1]:
            self._fix(source, "all channels of another tensor read them")
            del known[source]
        some = torch.randperm(count, generator=self.generator)[: (count + 1) // 2].sort()[0]
        trial = self._tried(node, known, some)
        if trial is None:
            return None
        whole, part = trial
        found = _part_of(whole, part, some, count)
        if found is None:
            return None
        axis, repeats = found
        labels = [k.labels for k in known.values()]
        for other in labels[1:]:
            self.classes.merge(labels[0], other)
        if not self._mixes(node, known, axis, count):
            self.classes.part(labels[0])
        return NodeChannels(axis, labels[0].repeat_interleave(repeats))

    def _drawn(self, node: fx.Node, known: Mapping[fx.Node, NodeChannels]) -> dict[fx.Node, Any]:
        """What a node reads, random numbers in place of the channels."""
        values = {n: self.values[n] for n in node.all_input_nodes}
        for source in known:
            value = values[source]
            if value.is_floating_point():
                drawn = torch.randn(value.shape, generator=self.generator)
                values[source] = drawn.to(value)
        return values

    def _tried(
        self, node: fx.Node, known: Mapping[fx.Node, NodeChannels], some: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """What an operation makes of random numbers, and of some of their channels."""
        values = self._drawn(node, known)
        parts = dict(values)
        for source, found in known.items():
            parts[source] = values[source].index_select(found.axis, some.to(values[source].device))
        try:
            whole, part = self._run(node, values), self._run(node, parts)
        except KeyboardInterrupt:
            raise
        except BaseException:  # fewer channels may be refused in any way
            return None
        return (whole, part) if isinstance(whole, Tensor) and isinstance(part, Tensor) else None

    def _mixes(
        self, node: fx.Node, known: Mapping[fx.Node, NodeChannels], axis: int, count: int
    ) -> bool:
        """Whether an operation gives of mixed channels a mixture of what it gives of them."""
        values = self._drawn(node, known)
        if not all(values[source].is_floating_point() for source in known):
            return False
        turns = _turns(count, self.generator)
        mixed = dict(values)
        for source, found in known.items():
            mixed[source] = _turned(values[source], turns, found.axis)
        whole, made = self._run(node, values), self._run(node, mixed)
        return whole.is_floating_point() and torch.allclose(
            _turned(whole, turns, axis), made, 1e-4, 1e-4 * float(whole.abs().max())
        )

    def found(self) -> ChannelMap:
        """Gather channels that the same modules make, change and read."""
        by_class: dict[int, list[tuple[str, str, int]]] = defaultdict(list)
        for role, known in (
            ("producers", self.outputs), ("through", self.through), ("consumers", self.inputs)
        ):  # fmt: skip
            for name, labels in known.items():
                for place, root in enumerate(self.classes.roots(labels).tolist()):
                    by_class[root].append((role, name, place))
        signatures: dict[tuple[tuple[str, str], ...], list[int]] = defaultdict(list)
        left: dict[str, str] = {}
        for root, places in by_class.items():
            reason = self.classes.fixed.get(root) or _unfit(places)
            if reason is None:
                signatures[tuple((role, name) for role, name, _ in places)].append(root)
            for name in (n for role, n, _ in places if role == "producers" and reason):
                left.setdefault(name, str(reason))
        groups, members = [], []
        taken: Counter[str] = Counter()
        for signature, roots in signatures.items():
            name = next(n for role, n in signature if role == "producers")
            if len(roots) < 2:
                continue
            taken[name] += 1
            unique = name if taken[name] == 1 else f"{name}#{taken[name]}"
            linear = not self.classes.apart.intersection(roots)
            groups.append(_group(unique, [by_class[root] for root in roots], linear=linear))
            members.append(torch.tensor(roots))
        nodes = {
            node.name: NodeChannels(found.axis, self.classes.roots(found.labels))
            for node, found in self.channels.items()
        }
        return ChannelMap(tuple(groups), left, nodes, tuple(members))


def _depthwise(site: LayerSite) -> bool:
    g = site.geometry
    return g.groups > 1 and g.groups == g.in_channels == g.out_channels


def _described(node: fx.Node) -> str:
    target = node.target
    return str(target) if isinstance(target, str) else getattr(target, "__name__", str(target))


def _part_of(whole: Tensor, part: Tensor, some: Tensor, count: int) -> tuple[int, int] | None:
    """The axis along which ``part`` holds some of the channels of ``whole``, and their repeats."""
    some = some.to(whole.device)
    for axis in _axes(whole, count):
        chosen = whole.index_select(axis, some)
        if chosen.shape == part.shape and torch.allclose(chosen, part, 1e-4, 1e-5):
            return axis, 1
    if whole.dim() == 2 and whole.shape[1] % count == 0:
        repeats = whole.shape[1] // count
        chosen = whole.unflatten(1, (count, repeats)).index_select(1, some).flatten(1)
        if chosen.shape == part.shape and torch.allclose(chosen, part, 1e-4, 1e-5):
            return 1, repeats
    return None


def _axes(whole: Tensor, count: int) -> Iterator[int]:
    return (axis for axis in range(1, whole.dim()) if whole.shape[axis] == count)


def _unfit(places: list[tuple[str, str, int]]) -> str | None:
    """Why a channel is left, or None."""
    roles = {role for role, _, _ in places}
    if "producers" not in roles:
        return "no layer makes them"
    if "consumers" not in roles:
        return "no layer reads them"
    makers = {name for role, name, _ in places if role == "producers"}
    readers = {name for role, name, _ in places if role == "consumers"}
    both = sorted(makers & readers)
    return f"{both[0]} reads what it makes itself" if both else None


def mixture(value: Tensor, rows: Tensor, axis: int) -> Tensor:
    """Mix the channels of a value.

    Args:
        value: Channels along ``axis``, each perhaps several times in a row, as where a map was
            flattened.
        rows: ``[mixtures, channels]``: what of each channel is in a mixture.
        axis: That of the channels.
    """
    count = rows.shape[1]
    split = value.unflatten(axis, (count, value.shape[axis] // count))
    found: Tensor = torch.tensordot(split, rows.to(value), dims=([axis], [1])).movedim(-1, axis)
    return found.flatten(axis, axis + 1)


def _turns(count: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Random rotations of channels: some at a time, since one of thousands would take minutes.

    Returns:
        Channels, drawn at random, and the orthogonal matrix that mixes them; together all channels.
    """
    chosen = torch.randperm(count, generator=generator).split(MIXED_TOGETHER)
    drawn = torch.randn(MIXED_TOGETHER, MIXED_TOGETHER, generator=generator, dtype=torch.float64)
    return [(some, torch.linalg.qr(drawn[: len(some), : len(some)])[0]) for some in chosen]


def _turned(value: Tensor, turns: list[tuple[Tensor, Tensor]], axis: int) -> Tensor:
    """A value whose channels, each perhaps several times in a row, are mixed as `_turns` says."""
    count = sum(len(some) for some, _ in turns)
    split = value.unflatten(axis, (count, value.shape[axis] // count))
    made = torch.empty_like(split, memory_format=torch.contiguous_format)
    for some, turn in turns:
        where = some.to(value.device)
        made.index_copy_(axis, where, mixture(split.index_select(axis, where), turn, axis))
    return made.flatten(axis, axis + 1)


def _group(name: str, channels: list[list[tuple[str, str, int]]], *, linear: bool) -> ChannelGroup:
    slots: dict[tuple[str, str], list[list[int]]] = defaultdict(list)
    for places in channels:
        found: dict[tuple[str, str], list[int]] = defaultdict(list)
        for role, module, place in places:
            found[role, module].append(place)
        for key, indices in found.items():
            slots[key].append(indices)

    def of(wanted: str) -> tuple[Slot, ...]:
        return tuple(
            Slot(module, torch.tensor(indices))
            for (role, module), indices in slots.items()
            if role == wanted
        )

    return ChannelGroup(
        name, len(channels), of("producers"), of("consumers"), of("through"), linear
    )
