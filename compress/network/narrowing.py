"""Taking channels out of a network: every module that has them becomes narrower, none is added.

Exact where the layers that read the channels do not look at them; what they would have looked at
is first put into the channels that stay (`compress.linalg.selection`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from compress.layers import kind_of, registered_kind
from compress.network.channels import NORMS, ChannelMap, Slot
from compress.network.sites import LayerSite
from compress.running.modules import module_names, replace_module


@dataclass(frozen=True)
class Width:
    """How wide a module became.

    Attributes:
        name: Its qualified name; ``aliases`` are all of them.
        inputs: Channels that it reads.
        outputs: Channels that it gives.
    """

    name: str
    aliases: tuple[str, ...]
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Kept:
    """Which channels of a module stay, ascending; None where all do."""

    inputs: Tensor | None = None
    outputs: Tensor | None = None


@dataclass(frozen=True)
class Cut:
    """A network with channels taken out of it, and how it fits the one that it was.

    Attributes:
        model: The narrower network; the network itself where nothing was cut.
        sites: Its layers by name; those that did not change are the same.
        kept: Of each module that became narrower, what it kept, by its first name.
        nodes: Of each node of the graph that gives fewer channels, the axis and those that stay.
        widths: The widths to rebuild it with.
    """

    model: nn.Module
    sites: Mapping[str, LayerSite]
    kept: Mapping[str, Kept] = field(default_factory=dict)
    nodes: Mapping[str, tuple[int, Tensor]] = field(default_factory=dict)
    widths: tuple[Width, ...] = ()

    def of_node(self, name: str, value: Tensor) -> Tensor:
        """What stays of a node's value of the whole network."""
        if name not in self.nodes:
            return value
        axis, stay = self.nodes[name]
        return value.index_select(axis, stay.to(value.device))

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

    def _chosen(self, name: str, value: Tensor, stay: Tensor | None) -> Tensor:
        if stay is None:
            return value
        return value.index_select(self.axis(name, value), stay.to(value.device))


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
    groups: Mapping[str, Tensor],
    weights: Mapping[str, tuple[Tensor, Tensor]],
) -> Cut:
    """Take channels out of a network.

    Args:
        model: The network; it is left as it was.
        sites: Its layers.
        channels: Its channels.
        groups: By group, the indices of those that stay.
        weights: For each layer that reads channels that go, the weight ``[groups, out, in,
            *kernel]`` that no longer looks at them, and its bias ``[out]``.
    """
    by_name = {site.name: site for site in sites}
    gone = _gone(groups, channels)
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
        stays = Kept(
            _stay(inputs, widths_of(module)[0]) if inputs else None,
            _stay(outputs, widths_of(module)[1]) if outputs else None,
        )
        narrow = _narrowed(module, stays)
        for alias in names[name]:
            replace_module(new, alias, narrow)
        kept[name] = stays
        widths.append(Width(name, names[name], *widths_of(narrow)))
        if name in by_name:
            geometry = registered_kind(narrow).geometry(narrow)
            biased = narrow._parameters.get("bias") is not None
            by_name[name] = replace(by_name[name], geometry=geometry, biased=biased)
    return Cut(new, by_name, kept, _nodes(channels, groups), tuple(widths))


def _stay(gone: set[int], count: int) -> Tensor:
    mask = torch.ones(count, dtype=torch.bool)
    mask[list(gone)] = False
    return mask.nonzero().flatten()


def _nodes(channels: ChannelMap, groups: Mapping[str, Tensor]) -> dict[str, tuple[int, Tensor]]:
    gone: set[int] = set()
    for group, labels in zip(channels.groups, channels.members, strict=True):
        if group.name in groups:
            mask = torch.ones(len(labels), dtype=torch.bool)
            mask[groups[group.name]] = False
            gone.update(labels[mask].tolist())
    found = {}
    for name, node in channels.nodes.items():
        stay = [i for i, label in enumerate(node.labels.tolist()) if label not in gone]
        if len(stay) < len(node.labels):
            found[name] = (node.axis, torch.tensor(stay))
    return found


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


def resized(module: nn.Module, inputs: int, outputs: int) -> nn.Module:
    """Return a module of other widths, no larger than its own, whose values are left over.

    Raises:
        ValueError: The module cannot have them.
    """
    now = widths_of(module)
    if not (1 <= inputs <= now[0] and 1 <= outputs <= now[1]):
        raise ValueError(f"{type(module).__name__} of {now} cannot have widths {inputs}, {outputs}")
    return _narrowed(module, Kept(torch.arange(inputs), torch.arange(outputs)))


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
        count = len(kept.outputs)
        weight = weight.index_select(0, kept.outputs.to(weight.device))
        geometry = geometry.with_(in_channels=count, out_channels=count, groups=count)
    else:
        for axis, stay in ((2, kept.inputs), (1, kept.outputs)):
            if stay is not None:
                weight = weight.index_select(axis, stay.to(weight.device))
        geometry = geometry.with_(in_channels=weight.shape[2], out_channels=weight.shape[1])
    values = None if bias is None else bias.detach().clone()
    if values is not None and kept.outputs is not None:
        values = values.index_select(0, kept.outputs.to(values.device))
    return _as(module, kind.build(geometry, weight.clone(), values))


def _each_narrowed(module: nn.Module, kept: Kept) -> nn.Module:
    """A norm or activation with parameters of each channel, with only some of them."""
    stay = kept.outputs if kept.outputs is not None else kept.inputs
    if stay is None:
        return module
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

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.narrow(self.cut.inputs_of(self.name, x))
        kept = self.cut.kept[self.name]
        if kept.outputs is None:
            return found
        whole: Tensor = self.whole(x)
        axis = self.cut.axis(self.name, whole)
        return whole.index_copy(axis, kept.outputs.to(whole.device), found)


def within(cut: Cut, name: str, whole: nn.Module, narrow: nn.Module) -> nn.Module:
    """Let a layer of the narrower network stand in the whole one.

    Args:
        cut: How the networks fit.
        name: The layer's name.
        whole: The layer as it was, which gives the outputs that the narrower one lacks.
        narrow: What became of it.
    """
    return _Within(cut, name, whole, narrow) if name in cut.kept else narrow
