"""Taking channels out of a network: every module that has them becomes narrower, none is added.

Exact where the layers that read the channels do not look at them; what they would have looked at
is first put into the channels that stay (`compress.linalg.selection`). Where only linear operations
lie between the layers that make and those that read channels, mixtures of them can stay instead:
the former give the mixtures, and the latter read them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from compress.layers import kind_of, registered_kind
from compress.network.channels import NORMS, ChannelMap, Slot, mixture
from compress.network.sites import LayerSite
from compress.running.modules import module_names, replace_module


@dataclass(frozen=True)
class Width:
    """How wide a module became.

    Attributes:
        name: Its qualified name; ``aliases`` are all of them.
        inputs: Channels that it reads.
        outputs: Channels that it gives.
        biased: Whether it has a bias, which it may have got.
        inputs_kept: Which of the original's channels the inputs are, ascending; empty where they
            are all of them, or mixtures.
        outputs_kept: The same of the outputs.
    """

    name: str
    aliases: tuple[str, ...]
    inputs: int
    outputs: int
    biased: bool = False
    inputs_kept: tuple[int, ...] = ()
    outputs_kept: tuple[int, ...] = ()


@dataclass(frozen=True)
class Part:
    """Which channels of a value stay.

    Attributes:
        stay: Their indices, ascending.
        turn: Orthogonal ``[channels, channels]`` that mixes them first; None where nothing does.
    """

    stay: Tensor
    turn: Tensor | None = None

    def of(self, value: Tensor, axis: int) -> Tensor:
        """What stays of a value with channels along an axis."""
        if self.turn is None:
            return value.index_select(axis, self.stay.to(value.device))
        return mixture(value, self.turn[self.stay], axis)

    def within(self, value: Tensor, found: Tensor, axis: int) -> Tensor:
        """A value with another one in place of what stays of it."""
        if self.turn is None:
            return value.index_copy(axis, self.stay.to(value.device), found)
        change = found - self.of(value, axis)
        return value + mixture(change, self.turn[self.stay].mT, axis)

    def of_matrix(self, matrix: Tensor) -> Tensor:
        """What stays of ``[..., channels, channels]``, both its rows and its columns."""
        if self.turn is not None:
            turn = self.turn.to(matrix)
            matrix = turn @ matrix @ turn.mT
        stay = self.stay.to(matrix.device)
        return matrix[..., stay, :][..., stay]


def _same(first: Part | None, second: Part | None) -> bool:
    if first is None or second is None:
        return first is second
    if (first.turn is None) != (second.turn is None) or not torch.equal(first.stay, second.stay):
        return False
    return first.turn is None or second.turn is None or torch.equal(first.turn, second.turn)


@dataclass(frozen=True)
class Kept:
    """Which channels of a module stay; None where all do."""

    inputs: Part | None = None
    outputs: Part | None = None

    def same(self, other: Kept) -> bool:
        """Whether another module keeps the same channels, mixed in the same way."""
        return _same(self.inputs, other.inputs) and _same(self.outputs, other.outputs)


@dataclass(frozen=True)
class Cut:
    """A network with channels taken out of it, and how it fits the one that it was.

    Attributes:
        model: The narrower network; the network itself where nothing was cut.
        sites: Its layers by name; those that did not change are the same.
        kept: Of each module that became narrower, what it kept, by its first name.
        nodes: Of each node of the graph that gives fewer channels, the axis and what stays.
        widths: The widths to rebuild it with.
    """

    model: nn.Module
    sites: Mapping[str, LayerSite]
    kept: Mapping[str, Kept] = field(default_factory=dict)
    nodes: Mapping[str, tuple[int, Part]] = field(default_factory=dict)
    widths: tuple[Width, ...] = ()

    def of_node(self, name: str, value: Tensor) -> Tensor:
        """What stays of a node's value of the whole network."""
        if name not in self.nodes:
            return value
        axis, part = self.nodes[name]
        return part.of(value, axis)

    def inputs_of(self, name: str, value: Tensor) -> Tensor:
        """What stays of a layer's input ``[N, channels, ...]`` or ``[..., channels]``."""
        return self._chosen(name, value, self.kept.get(name, Kept()).inputs)

    def outputs_of(self, name: str, value: Tensor) -> Tensor:
        """What stays of a layer's output, as `inputs_of`."""
        return self._chosen(name, value, self.kept.get(name, Kept()).outputs)

    def axis(self, name: str, value: Tensor) -> int:
        """The axis of a layer's input or output that counts channels."""
        site = self.sites.get(name)
        linear = site is not None and site.geometry.kind == "linear"
        return value.dim() - 1 if linear else 1

    def _chosen(self, name: str, value: Tensor, part: Part | None) -> Tensor:
        return value if part is None else part.of(value, self.axis(name, value))


def _gone(
    groups: Mapping[str, Tensor], channels: ChannelMap
) -> dict[str, tuple[set[int], set[int]]]:
    """Of each module, the inputs and outputs that go, for the channels that groups keep.

    Args:
        groups: By group, the channels that stay.
        channels: All groups.
    """
    gone: dict[str, tuple[set[int], set[int]]] = {}

    def take(slots: Iterable[Slot], stay: Tensor, sides: tuple[int, ...]) -> None:
        for slot in slots:
            mask = torch.ones(len(slot.places), dtype=torch.bool)
            mask[stay] = False
            places = slot.places[mask].flatten().tolist()
            for side in sides:
                gone.setdefault(slot.name, (set(), set()))[side].update(places)

    for name, stay in groups.items():
        group = channels.group(name)
        if len(stay) == group.size:
            continue
        take(group.producers, stay, (1,))
        take(group.consumers, stay, (0,))
        take(group.through, stay, (0, 1))
    return gone


def widths_at(
    model: nn.Module, channels: ChannelMap, groups: Mapping[str, int]
) -> tuple[Width, ...]:
    """How wide modules are with groups of given widths.

    Args:
        model: The whole network.
        channels: Its channels.
        groups: How many channels stay, by group.
    """
    names = {n: listed for listed in module_names(model).values() for n in listed}
    gone = _gone({name: torch.arange(width) for name, width in groups.items()}, channels)
    found = []
    for name, (inputs, outputs) in gone.items():
        now = widths_of(model.get_submodule(name))
        found.append(Width(name, names[name], now[0] - len(inputs), now[1] - len(outputs)))
    return tuple(found)


def cut(
    model: nn.Module,
    sites: Iterable[LayerSite],
    channels: ChannelMap,
    groups: Mapping[str, Part],
    weights: Mapping[str, tuple[Tensor, Tensor]],
) -> Cut:
    """Take channels out of a network.

    Args:
        model: The network; it is left as it was.
        sites: Its layers.
        channels: Its channels.
        groups: By group, which stay.
        weights: For each layer that reads channels that go, the weight ``[groups, out, in,
            *kernel]`` of its mixed inputs that no longer looks at them, and its bias ``[out]``.
    """
    by_name = {site.name: site for site in sites}
    groups = {n: p for n, p in groups.items() if len(p.stay) < channels.group(n).size}
    gone = _gone({name: part.stay for name, part in groups.items()}, channels)
    turns = turns_of(model, channels, groups)
    if not gone:
        return Cut(model, by_name)
    new = copy.deepcopy(model)
    names = {n: listed for listed in module_names(model).values() for n in listed}
    kept: dict[str, Kept] = {}
    widths: list[Width] = []
    for name, (inputs, outputs) in gone.items():
        module = new.get_submodule(name)
        if name in weights:
            module = _with_weight(module, *weights[name])
        turn = turns.get(name, (None, None))
        stays = Kept(
            Part(_stay(inputs, widths_of(module)[0]), turn[0]) if inputs else None,
            Part(_stay(outputs, widths_of(module)[1]), turn[1]) if outputs else None,
        )
        narrow = _narrowed(module, stays)
        for alias in names[name]:
            replace_module(new, alias, narrow)
        kept[name] = stays
        listed = [_listed(part) for part in (stays.inputs, stays.outputs)]
        widths.append(Width(name, names[name], *widths_of(narrow), False, *listed))
        if name in by_name:
            geometry = registered_kind(narrow).geometry(narrow)
            biased = narrow._parameters.get("bias") is not None
            by_name[name] = replace(by_name[name], geometry=geometry, biased=biased)
    return Cut(new, by_name, kept, _nodes(channels, groups), tuple(widths))


def _listed(part: Part | None) -> tuple[int, ...]:
    """Which channels stay, where they are the original's own and not all."""
    return () if part is None or part.turn is not None else tuple(part.stay.tolist())


def kept_in(width: Width, module: nn.Module) -> Kept | None:
    """Which channels a module kept; None of mixtures, as nothing tells which they are.

    Args:
        width: How wide it became.
        module: It, as it was before.

    Raises:
        ValueError: Channels that it cannot have kept.
    """
    sides = (width.inputs, width.inputs_kept), (width.outputs, width.outputs_kept)
    parts: list[Part | None] = []
    for whole, (count, kept) in zip(widths_of(module), sides, strict=True):
        if kept:
            if len(kept) != count or list(kept) != sorted({*kept}) or kept[-1] >= whole:
                raise ValueError(f"module {width.name!r} cannot have kept such channels")
            parts.append(Part(torch.tensor(kept)))
        elif count == whole:
            parts.append(None)
        else:
            return None
    return Kept(*parts)


def _stay(gone: set[int], count: int) -> Tensor:
    mask = torch.ones(count, dtype=torch.bool)
    mask[list(gone)] = False
    return mask.nonzero().flatten()


def turns_of(
    model: nn.Module, channels: ChannelMap, groups: Mapping[str, Part]
) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """What mixes the inputs and outputs of modules before channels go, orthogonal.

    Args:
        model: The network.
        channels: Its channels.
        groups: By group, which stay, of those that lose any.
    """
    found: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for name, part in groups.items():
        if part.turn is None:
            continue
        group = channels.group(name)
        for side, slots in enumerate((group.consumers, group.producers)):
            for slot in slots:
                both = list(found.get(slot.name, (None, None)))
                size = widths_of(model.get_submodule(slot.name))[side]
                whole = both[side]
                whole = torch.eye(size, dtype=torch.float64) if whole is None else whole
                both[side] = _turned(whole, slot.places.T, part.turn)
                found[slot.name] = both[0], both[1]
    return found


def _turned(whole: Tensor, copies: Iterable[Tensor], turn: Tensor) -> Tensor:
    """An orthogonal matrix that also mixes channels, wherever copies of them lie."""
    for places in copies:
        whole[places.unsqueeze(1), places] = turn.to(whole)
    return whole


def _nodes(channels: ChannelMap, groups: Mapping[str, Part]) -> dict[str, tuple[int, Part]]:
    gone: set[int] = set()
    turned: dict[int, tuple[str, int]] = {}
    for group, labels in zip(channels.groups, channels.members, strict=True):
        if group.name in groups:
            part = groups[group.name]
            mask = torch.ones(len(labels), dtype=torch.bool)
            mask[part.stay] = False
            gone.update(labels[mask].tolist())
            if part.turn is not None:
                turned.update({label: (group.name, i) for i, label in enumerate(labels.tolist())})
    found = {}
    for name, node in channels.nodes.items():
        of_node = node.labels.tolist()
        stay = [i for i, label in enumerate(of_node) if label not in gone]
        if len(stay) < len(of_node):
            turn = _turn_of(of_node, turned, groups)
            found[name] = (node.axis, Part(torch.tensor(stay), turn))
    return found


def _turn_of(
    labels: list[int], turned: Mapping[int, tuple[str, int]], groups: Mapping[str, Part]
) -> Tensor | None:
    """What mixes the channels of a node, given what each of them is."""
    places: dict[str, dict[int, list[int]]] = {}
    for place, label in enumerate(labels):
        if label in turned:
            group, channel = turned[label]
            places.setdefault(group, {}).setdefault(channel, []).append(place)
    if not places:
        return None
    whole = torch.eye(len(labels), dtype=torch.float64)
    for group, channels in places.items():
        turn = groups[group].turn
        assert turn is not None  # or nothing of it would be turned
        copies = zip(*(channels[i] for i in range(len(turn))), strict=True)
        whole = _turned(whole, (torch.tensor(copy) for copy in copies), turn)
    return whole


def widths_of(module: nn.Module) -> tuple[int, int]:
    """How many channels a module reads and gives.

    Raises:
        ValueError: It is none that has channels.
    """
    kind = kind_of(module)
    if kind is not None:
        geometry = kind.geometry(module)
        return geometry.in_channels, geometry.out_channels
    if type(module) in NORMS:
        return (module.num_features,) * 2  # type: ignore[return-value]  # a whole number
    if type(module) is nn.PReLU:
        return (module.num_parameters,) * 2
    raise ValueError(f"a {type(module).__name__} has no channels to take out")


def resized(module: nn.Module, inputs: int, outputs: int, *, biased: bool) -> nn.Module:
    """Return a module of other widths, no larger than its own, whose values are left over.

    Args:
        module: As wide as it was.
        inputs: Channels that it reads.
        outputs: Channels that it gives.
        biased: Whether it gets a bias where it has none.

    Raises:
        ValueError: The module cannot have them.
    """
    now = widths_of(module)
    if not (1 <= inputs <= now[0] and 1 <= outputs <= now[1]):
        raise ValueError(f"{type(module).__name__} of {now} cannot have widths {inputs}, {outputs}")
    found = _narrowed(module, Kept(Part(torch.arange(inputs)), Part(torch.arange(outputs))))
    if biased and kind_of(found) is not None and found._parameters.get("bias") is None:
        weight = registered_kind(found).weight(found)
        return _with_weight(found, weight, weight.new_zeros(outputs))
    return found


def _with_weight(module: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    kind = registered_kind(module)
    like = next(module.parameters())
    built = kind.build(kind.geometry(module), weight.to(like), bias.to(like))
    return _as(module, built)


def _narrowed(module: nn.Module, kept: Kept) -> nn.Module:
    """A module with only some of its channels."""
    kind = kind_of(module)
    if kind is None:
        return _each_narrowed(module, kept)
    geometry, weight = kind.geometry(module), kind.weight(module)
    bias = module._parameters.get("bias")
    if geometry.groups > 1:
        if kept.outputs is None or geometry.groups != geometry.out_channels:
            raise ValueError("a grouped layer has no channels to take out")
        weight = kept.outputs.of(weight, 0)
        count = len(weight)
        geometry = geometry.with_(in_channels=count, out_channels=count, groups=count)
    else:
        if kept.inputs is not None:  # the weight is already one of mixed inputs
            weight = Part(kept.inputs.stay).of(weight, 2)
        if kept.outputs is not None:
            weight = kept.outputs.of(weight, 1)
        geometry = geometry.with_(in_channels=weight.shape[2], out_channels=weight.shape[1])
    values = None if bias is None else bias.detach().clone()
    if values is not None and kept.outputs is not None:
        values = kept.outputs.of(values, 0)
    return _as(module, kind.build(geometry, weight.clone(), values))


def _each_narrowed(module: nn.Module, kept: Kept) -> nn.Module:
    """A norm or activation with parameters of each channel, with only some of them."""
    part = kept.outputs if kept.outputs is not None else kept.inputs
    if part is None:
        return module
    stay = part.stay
    count = widths_of(module)[1]
    narrow = copy.deepcopy(module)

    def of(tensor: Tensor) -> Tensor:
        some = tensor.dim() and len(tensor) == count
        return tensor.detach()[stay.to(tensor.device)].clone() if some else tensor.detach()

    for name, parameter in narrow._parameters.items():
        if parameter is not None:
            narrow._parameters[name] = nn.Parameter(of(parameter), parameter.requires_grad)
    for name, buffer in narrow._buffers.items():
        if buffer is not None:
            narrow._buffers[name] = of(buffer)
    attribute = "num_parameters" if isinstance(module, nn.PReLU) else "num_features"
    setattr(narrow, attribute, len(stay))
    return narrow


def _as(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give a module the flags of the one that it replaces."""
    new.train(old.training)
    for name, parameter in new.named_parameters():
        before = old._parameters.get(name)
        like = next(old.parameters()) if before is None else before
        parameter.requires_grad_(like.requires_grad)
    return new


class _Within(nn.Module):
    """A narrower module in the place of the whole one: outputs that it lacks are the old ones."""

    def __init__(self, cut: Cut, name: str, whole: nn.Module, narrow: nn.Module) -> None:
        super().__init__()
        self.cut, self.name, self.whole, self.narrow = cut, name, whole, narrow

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch's own layers name it
        """Give what the whole network's next layers expect."""
        found: Tensor = self.narrow(self.cut.inputs_of(self.name, input))
        kept = self.cut.kept[self.name]
        if kept.outputs is None:
            return found
        whole: Tensor = self.whole(input)
        return kept.outputs.within(whole, found, self.cut.axis(self.name, whole))


def within(cut: Cut, name: str, whole: nn.Module, narrow: nn.Module) -> nn.Module:
    """Let a layer of the narrower network stand in the whole one.

    Args:
        cut: How the networks fit.
        name: The layer's name.
        whole: The layer as it was, which gives the outputs that the narrower one lacks.
        narrow: What became of it.
    """
    return _Within(cut, name, whole, narrow) if name in cut.kept else narrow
