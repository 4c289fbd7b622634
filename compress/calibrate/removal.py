"""Which channels of a group go first, and the network without them, from statistics alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from compress.calibrate.problems import bias_of, fit_problem
from compress.calibrate.statistics import Calibration, LayerStatistics
from compress.layers import registered_kind
from compress.linalg.moments import Moments
from compress.linalg.problem import Problem
from compress.linalg.selection import (
    Reader,
    Removal,
    compensated,
    removal,
    removal_of_directions,
)
from compress.network.baseline import Network
from compress.network.channels import ChannelGroup, ChannelMap, Slot
from compress.network.narrowing import Cut, Part, cut, turns_of
from compress.network.sites import LayerSite
from compress.plan import NARROW, NARROWER, SLICE, Plan

# Longer patches of a layer would take minutes and gigabytes.
LONGEST_READER = 4608


def unread(group: ChannelGroup, sites: Mapping[str, LayerSite]) -> str | None:
    """Return why a group is left whose channels could be taken out, or None."""
    for slot in group.producers:
        if slot.places.numel() < sites[slot.name].geometry.out_channels:
            return f"only some of the outputs of {slot.name} belong to it"
    for slot in group.consumers:
        if sites[slot.name].geometry.in_features > LONGEST_READER:
            return f"the patches of {slot.name} are too long to tell which to take"
    return None


def groups_of(channels: ChannelMap, sites: Iterable[LayerSite]) -> tuple[ChannelGroup, ...]:
    """The groups whose channels may be taken out, as far as their layers say."""
    by_name = {site.name: site for site in sites}
    return tuple(g for g in channels.groups if unread(g, by_name) is None)


def readers_of(network: Network) -> frozenset[str]:
    """Names of the layers whose patches tell which channels can go."""
    found = groups_of(network.channels, network.sites)
    return frozenset(slot.name for group in found for slot in group.consumers)


def way_of(group: ChannelGroup, ways: Collection[str]) -> str | None:
    """How a group is cut: ``"slice"`` where that is allowed and possible, ``"narrow"``, or not."""
    if group.linear and SLICE in ways:
        return SLICE
    return NARROW if NARROW in ways else None


@dataclass(frozen=True)
class Lost:
    """What a layer loses with some of its inputs, on the rows seen.

    Attributes:
        loss: Predicted increase of the objective per image.
        mse: Mean squared error per output element.
    """

    loss: float
    mse: float


@dataclass(frozen=True)
class Narrower:
    """What takes channels out of a network.

    Attributes:
        model: The network, norms folded.
        sites: Its layers.
        channels: Its channels.
        calibration: Statistics, with the patches of `readers_of`.
        ways: ``"narrow"``, ``"slice"`` or both.
    """

    model: nn.Module
    sites: tuple[LayerSite, ...]
    channels: ChannelMap
    calibration: Calibration
    ways: Collection[str] = NARROWER

    @cached_property
    def by_name(self) -> dict[str, LayerSite]:
        """The layers by name."""
        return {site.name: site for site in self.sites}

    def groups(self) -> tuple[ChannelGroup, ...]:
        """The groups that statistics say enough of."""
        found = self.calibration.statistics
        return tuple(
            group
            for group in groups_of(self.channels, self.sites)
            if way_of(group, self.ways) is not None
            and all(
                slot.name in found and found[slot.name].inputs is not None
                for slot in group.consumers
            )
        )

    def removal(self, name: str) -> Removal:
        """The order in which the channels of a group can go; worked out once."""
        known = self.calibration.removals
        way = self.way(name)
        if (way, name) not in known:
            find = removal_of_directions if way == SLICE else removal
            consumers = self.channels.group(name).consumers
            known[way, name] = find([self._reader(slot) for slot in consumers])
        return known[way, name]

    def way(self, name: str) -> str:
        """How a group is cut; see `way_of`."""
        return way_of(self.channels.group(name), self.ways) or NARROW

    def cut(self, widths: Mapping[str, int]) -> tuple[Cut, dict[str, Lost]]:
        """The network with groups of given widths, what is lost put into what stays.

        Args:
            widths: How many channels stay, by group.

        Returns:
            The network, and what the layers lose that read the channels.
        """
        parts: dict[str, Part] = {}
        gone: dict[str, list[Tensor]] = {}
        for name, width in widths.items():
            found, group = self.removal(name), self.channels.group(name)
            if width == group.size:
                continue
            turn = None if found.basis is None else found.basis.mT.cpu()
            parts[name] = Part(found.stay(width), turn)
            mask = torch.ones(group.size, dtype=torch.bool)
            mask[parts[name].stay] = False
            for slot in group.consumers:
                gone.setdefault(slot.name, []).append(slot.places[mask].flatten())
        turns = turns_of(self.model, self.channels, parts)
        weights, lost = {}, {}
        for name, places in gone.items():
            turn = turns.get(name, (None, None))[0]
            weights[name], lost[name] = self._weight(self.by_name[name], torch.cat(places), turn)
        return cut(self.model, self.sites, self.channels, parts, weights), lost

    def statistics(self, found: Cut) -> dict[str, LayerStatistics]:
        """The statistics of the layers of a network with channels taken out."""
        result = {}
        for name, statistics in self.calibration.statistics.items():
            kept = found.kept.get(name)
            if kept is None:
                result[name] = statistics
                continue
            taps = self._taps(self.by_name[name])
            result[name] = _some(statistics, _patches(kept.inputs, taps), kept.outputs)
        return result

    def _problem(self, name: str) -> Problem:
        module = self.model.get_submodule(name)
        return fit_problem(self.by_name[name], module, self.calibration.statistics[name])

    def _reader(self, slot: Slot) -> Reader:
        site, problem = self.by_name[slot.name], self._problem(slot.name)
        assert problem.input_covariance is not None  # `groups` sees to it
        root = problem.rooted(problem.matrix)[0] * (0.5 * site.positions) ** 0.5
        columns = columns_of(slot.places.flatten(), self._taps(site))
        return Reader(root, problem.input_covariance[0], columns.reshape(len(slot.places), -1))

    @staticmethod
    def _taps(site: LayerSite) -> int:
        return math.prod(site.geometry.kernel_size)

    def _weight(
        self, site: LayerSite, gone: Tensor, turn: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], Lost]:
        """The weight of a layer that does not look at some inputs, and its bias; what it loses.

        Args:
            site: The layer.
            gone: The inputs that it does not look at.
            turn: What mixes its inputs first; of these is the weight.
        """
        module, problem = self.model.get_submodule(site.name), self._problem(site.name)
        statistics = self.calibration.statistics[site.name]
        assert problem.input_covariance is not None
        assert statistics.inputs is not None
        mask = torch.ones(site.geometry.in_channels, dtype=torch.bool)
        mask[gone] = False
        taps = self._taps(site)
        columns = columns_of(mask.nonzero().flatten(), taps)
        matrix, covariance = problem.matrix[0], problem.input_covariance[0]
        whole = None if turn is None else _of_patches(turn, taps).to(matrix.device)
        mixed = matrix.double(), covariance
        if whole is not None:
            mixed = mixed[0] @ whole.mT, whole @ covariance.double() @ whole.mT
        found = compensated(*mixed, columns.to(matrix.device))
        seen = found if whole is None else found @ whole
        delta = matrix - seen
        bias = bias_of(module) + delta @ statistics.inputs.mean[0]
        loss, _ = problem.errors(seen.unsqueeze(0))
        error = (delta @ statistics.inputs.covariance[0] * delta).sum()
        mse = float(error) / site.geometry.out_channels
        shape = registered_kind(module).weight(module).shape
        return (found.reshape(shape), bias), Lost(0.5 * site.positions * loss, mse)


def columns_of(channels: Tensor, taps: int) -> Tensor:
    """Where channels lie in a patch, all taps of each."""
    return (channels.unsqueeze(1) * taps + torch.arange(taps)).flatten()


def _of_patches(turn: Tensor, taps: int) -> Tensor:
    """What mixes whole patches where ``turn`` mixes channels."""
    return torch.kron(turn, torch.eye(taps, dtype=turn.dtype))


def _patches(part: Part | None, taps: int) -> Part | None:
    """What stays of patches where a part of the channels stays."""
    if part is None:
        return None
    turn = None if part.turn is None else _of_patches(part.turn, taps)
    return Part(columns_of(part.stay, taps), turn)


def _some(
    statistics: LayerStatistics, inputs: Part | None, outputs: Part | None
) -> LayerStatistics:
    """Statistics of only some columns of a layer's patches, and some of its outputs."""
    of_rows = inputs if statistics.inputs is not None else outputs
    return replace(
        statistics,
        inputs=_selected(statistics.inputs, inputs),
        outputs=_selected(statistics.outputs, outputs),
        weighting=_selected(statistics.weighting, outputs),
        pooled=_selected(statistics.pooled, of_rows, more=1),
    )


def _selected(moments: Moments | None, part: Part | None, more: int = 0) -> Moments | None:
    """Moments of some columns, and of the last ``more`` as well."""
    if moments is None or part is None:
        return moments
    length = moments.mean.shape[1]
    stay = torch.cat([part.stay, torch.arange(length - more, length)])
    turn = part.turn
    if turn is not None and more:
        turn = torch.block_diag(turn, torch.eye(more, dtype=turn.dtype))
    whole = Part(stay, turn)
    found = Moments(1, 0, moments.mean.device)
    found.count = moments.count
    found.mean = whole.of(moments.mean, 1)
    found.scatter = whole.of_matrix(moments.scatter)
    return found


def group_widths(plan: Plan, channels: ChannelMap) -> dict[str, int]:
    """How many channels a plan leaves in each group that it makes narrower.

    Args:
        plan: The plan, whose widths agree.
        channels: The network's.
    """
    width = {c.name: c.width for c in plan.choices if c.width is not None}
    if not width:
        return {}
    found = {}
    for group in channels.groups:
        makers = [width[slot.name] for slot in group.producers if slot.name in width]
        if makers and makers[0][1] < group.size:
            found[group.name] = makers[0][1]
    return found
