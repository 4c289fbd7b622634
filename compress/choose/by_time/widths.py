"""What narrower layers take: measured at a few widths, and between them interpolated.

The layers of a channel group are timed at a coarse grid of widths of their inputs and outputs. Time
goes in steps, as kernels compute channels in blocks, so that no formula stands for it. A layer
takes no longer than one that is wider in both, as which it could be run: where it was measured to,
something else ran at that moment.

A chain's time at other widths is its time at whole widths, by the shares of its MACs before and
after the ranks, each scaled as the layer itself is in that width alone. What else is done with a
group's channels, such as activations and sums, takes time in proportion to them, as far as the
whole network was measured to become faster by that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from compress.choose.choices import narrowed_site, rounded_up
from compress.choose.costs import AtParts, Floats, Width, counted, stage_costs
from compress.choose.widths import MULTIPLE, WIDE, Widths
from compress.network.channels import ChannelGroup
from compress.network.narrowing import resized
from compress.network.sites import LayerSite
from compress.plan import DENSE, Candidate
from compress.progress import Track, silent
from compress.rules import Currency
from compress.rules.latency import BY_TIME
from compress.timing.layers import LayerTimer
from compress.timing.turns import Pace

# Widths that a group may take, its own among them, and those of a layer that are timed.
WIDTHS = 8
TIMED_WIDTHS = 4
# Groups of at least so many channels take multiples of 4.
MIDDLE, SMALL_MULTIPLE = 16, 4


def coarse_grid(size: int, round_to: int | None) -> tuple[int, ...]:
    """The widths that a group may take under a budget of time, ascending, its own last."""
    multiple = round_to or _multiple(size)
    steps = (math.ceil(size * step / WIDTHS) for step in range(1, WIDTHS))
    narrow = {rounded_up(step, multiple, size) for step in steps} - {size}
    return (*sorted(narrow), size)


def _multiple(size: int) -> int:
    if size >= WIDE:
        return MULTIPLE
    return SMALL_MULTIPLE if size >= MIDDLE else 1


@dataclass(frozen=True)
class Shares:
    """What a layer takes at some widths, as shares of its time at its whole width.

    Attributes:
        inputs: Parts of its inputs, ascending, the last of them 1.
        outputs: Parts of its outputs.
        times: ``[inputs, outputs]``; rises along both, up to 1.
    """

    inputs: Floats
    outputs: Floats
    times: Floats

    def at(self, i: Floats, o: Floats) -> Floats:
        """The shares at parts of inputs and outputs ``[n]``, linear between those known.

        Returns:
            Where both are that narrow, the inputs alone, neither, and the outputs alone,
            ``[n, 4]``.
        """
        rows = _between(self.inputs, i)
        columns = _between(self.outputs, o)
        both = ((rows @ self.times) * columns).sum(1)
        inputs, outputs = rows @ self.times[:, -1], columns @ self.times[-1]
        return np.stack([both, inputs, np.ones_like(both), outputs], 1)


def _between(known: Floats, at: Floats) -> Floats:
    """Weights ``[n, known]`` of linear interpolation, within the range that is known."""
    weights = np.zeros((len(at), len(known)))
    each = np.arange(len(at))
    above = np.minimum(np.searchsorted(known, at), len(known) - 1)
    below = np.maximum(above - 1, 0)
    gap = known[above] - known[below]
    # Beside the range, and where one width alone is known, the nearest counts in full.
    part = np.clip((at - known[below]) / np.where(gap > 0, gap, 1.0), 0.0, 1.0)
    part = np.where(above == below, 1.0, part)
    weights[each, below] = 1.0 - part
    weights[each, above] = part
    return weights


def shares(inputs: Sequence[int], outputs: Sequence[int], seconds: Floats) -> Shares:
    """Make measured seconds ``[inputs, outputs]`` shares of the last, rising along both."""
    falling = seconds[::-1, ::-1]
    times = np.minimum.accumulate(np.minimum.accumulate(falling, 0), 1)[::-1, ::-1]
    return Shares(
        np.array(inputs) / inputs[-1], np.array(outputs) / outputs[-1], times / times[-1, -1]
    )


@dataclass(frozen=True)
class TimedCosts:
    """Seconds a batch; a `compress.choose.costs.Costs`.

    Attributes:
        seconds: Of each layer as it is, by name.
        shares: Of each layer that may become narrower.
        rest: Of what else is done with the channels of each group, by its name.
        currency: `BY_TIME`.
    """

    seconds: Mapping[str, float]
    shares: Mapping[str, Shares]
    rest: Mapping[str, float] = field(default_factory=dict)
    currency: Currency = BY_TIME

    def at_parts(self, site: LayerSite, candidates: Sequence[Candidate]) -> AtParts:
        """See `Costs`."""
        known = self.shares.get(site.name)
        whole = np.array([c.seconds or 0.0 for c in candidates])
        if known is None:
            return lambda i, _: np.tile(whole, (len(i), 1))
        stages = np.array([_stages(site, c) for c in candidates]).T * whole
        return lambda i, o: known.at(i, o) @ stages

    def dense(self, site: LayerSite, width: Width | None) -> float:
        """See `Costs`."""
        seconds = self.seconds.get(site.name, 0.0)
        if width is None:
            return seconds
        whole = Candidate(DENSE, (), 0.0, site.macs, site.params, seconds)
        return self._at_width(site, width)(whole)

    def narrowed(self, site: LayerSite, width: Width) -> Callable[[Candidate], Candidate | None]:
        """See `Costs`."""
        count, seconds = counted(narrowed_site(site, width)), self._at_width(site, width)

        def costed(candidate: Candidate) -> Candidate | None:
            found = count(candidate)
            return found and replace(found, seconds=seconds(candidate))

        return costed

    def others(self, group: ChannelGroup, widths: Sequence[int]) -> Floats:
        """See `Costs`."""
        return self.rest.get(group.name, 0.0) * np.array(widths) / group.size

    def _at_width(self, site: LayerSite, width: Width) -> Callable[[Candidate], float]:
        """What candidates take at one width of their layer."""
        known = self.shares.get(site.name)
        if known is None:
            return lambda candidate: candidate.seconds or 0.0
        i, o = width[0] / site.geometry.in_channels, width[1] / site.geometry.out_channels
        found = known.at(np.array([i]), np.array([o]))[0]
        return lambda candidate: (
            (candidate.seconds or 0.0) * float(found @ _stages(site, candidate))
        )


def _stages(site: LayerSite, candidate: Candidate) -> tuple[float, float, float, float]:
    """What parts of a candidate's time go with each of the shares that `Shares.at` gives.

    A layer that stays whole narrows on both sides; of a chain, the share of its MACs before its
    ranks goes with the inputs, that after them with the outputs.
    """
    if candidate.scheme == DENSE:
        return 1.0, 0.0, 0.0, 0.0
    macs = [float(part.macs) for part in stage_costs(site, candidate)]
    total = sum(macs) or 1.0
    return 0.0, macs[0] / total, sum(macs[1:-1]) / total, macs[-1] / total


def touched(widths: Widths) -> list[LayerSite]:
    """The layers that some width makes narrower."""
    return [widths.sites[name] for name in widths.layer_widths(widths.narrowest())]


def timed_shares(
    model: nn.Module, widths: Widths, how: tuple[LayerTimer, Pace], track: Track = silent
) -> tuple[dict[str, float], dict[str, Shares]]:
    """Measure the layers of all groups at a few widths, those of a layer in turns.

    Args:
        model: The dense network, on the device and in the dtype of the setting.
        widths: What may become narrower.
        how: How layers are timed, and how thoroughly each at all its widths.
        track: Progress.

    Returns:
        Seconds a batch of each as it is, over all calls, and the shares of it at other widths.
    """
    least = widths.layer_widths(widths.narrowest())
    layers = touched(widths)
    seconds, found = {}, {}
    for site in track(layers, f"time widths, {how[0].setting.memory_format}", len(layers)):
        geometry = site.geometry
        inputs = _timed(least[site.name][0], geometry.in_channels)
        outputs = _timed(least[site.name][1], geometry.out_channels)
        each = geometry.groups > 1
        pairs = [(w, w) for w in outputs] if each else [(i, o) for i in inputs for o in outputs]
        times = np.array(_seconds(model.get_submodule(site.name), site, pairs, how))
        seconds[site.name] = float(times[-1])
        if each:
            found[site.name] = shares([1], outputs, times[None])
        else:
            found[site.name] = shares(inputs, outputs, times.reshape(len(inputs), -1))
    return seconds, found


def _timed(least: int, size: int) -> list[int]:
    """Widths of a layer that are timed: the least, its own and some between, in multiples."""
    steps = np.linspace(min(least, size), size, TIMED_WIDTHS)
    multiple = _multiple(size)
    between = {rounded_up(math.ceil(step), multiple, size) for step in steps[1:-1]}
    return sorted({min(least, size), *between, size})


def _seconds(
    module: nn.Module,
    site: LayerSite,
    widths: Iterable[Width],
    how: tuple[LayerTimer, Pace],
) -> list[float]:
    """Seconds of a layer at each of some widths, over all its calls."""
    timer, pace = how
    cases = []
    for inputs, outputs in widths:
        whole = (inputs, outputs) == (site.geometry.in_channels, site.geometry.out_channels)
        biased = narrowed_site(site, (inputs, outputs)).biased
        layer = module if whole else resized(module, inputs, outputs, biased=biased)
        narrow = narrowed_site(site, (inputs, outputs))
        cases += [(layer, narrow.input_shape(call, timer.batch)) for call in site.calls]
    flat = timer.time(cases, pace)
    calls = len(site.calls)
    return [sum(flat[i : i + calls]) for i in range(0, len(flat), calls)]


def rest_of_groups(
    widths: Widths, rest: float, faster: float, parts: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of what is none of the layers, by the group whose channels it is done with.

    It is taken to go by the numbers that the group's layers give an image, as activations do.

    Args:
        widths: What may become narrower.
        rest: Seconds of all that is none of the layers.
        faster: How much less of them it took in a network whose groups were narrower.
        parts: How much of each group that network had.
    """
    numbers = {o.group.name: float(_numbers(o.group, widths.sites)) for o in widths.options}
    gone = sum(count * (1 - parts.get(name, 1.0)) for name, count in numbers.items())
    everything = sum(s.positions * s.geometry.out_channels for s in widths.sites.values())
    if gone <= 0 or rest <= 0:
        return dict.fromkeys(numbers, 0.0)
    # No more than all of it, shared by the numbers that all layers give.
    each = min(max(faster, 0.0) / gone, rest / max(everything, 1))
    return {name: each * count for name, count in numbers.items()}


def _numbers(group: ChannelGroup, sites: Mapping[str, LayerSite]) -> int:
    slots = (*group.producers, *group.through)
    return sum(sites[s.name].positions * s.places.numel() for s in slots if s.name in sites)
