"""Widths of channel groups and ranks of layers under one budget.

A group's width multiplies the cost of every layer that makes, changes or reads its channels, and
the cost of a layer between two groups is a product of both widths. With a price on cost (Lagrange's
multiplier), groups are visited in turn and each takes the width that is best while all others stay
as they are and every layer answers with its best rank; that is repeated until none changes
(coordinate descent, which finds a point that no single group can improve). The price is bisected.
For the width patterns found nearest to the budget, ranks are then chosen exactly
(`compress.choose.knapsack`), and so for the network as it is: the pattern of least predicted loss
wins, so that widths never make a plan worse than ranks alone.

A layer's predicted loss at a rank is taken to be the same at all widths. It is, up to what the
channels taken out would have added to the layer's error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from compress.calibrate.removal import Narrower
from compress.choose.choices import SchemeCost, narrowed_site, rounded_up
from compress.choose.overrides import Overrides
from compress.linalg.schemes import scheme_named
from compress.network.channels import ChannelGroup
from compress.network.sites import LayerSite
from compress.plan import DENSE, Candidate
from compress.progress import Track, silent
from compress.rules import Currency

# Widths that a group may take, beside its own.
GRID = 16
# Groups of at least so many channels take multiples of 8, as kernels for vectors of numbers do.
WIDE, MULTIPLE = 64, 8
# Steps of the price, and rounds of visits at each.
_BISECTIONS = 20
_ROUNDS = 8
# Width patterns for which ranks are chosen exactly.
PATTERNS = 5

Floats = NDArray[np.float64]
# Widths by group; those that are not named stay as they are.
Pattern = dict[str, int]


@dataclass(frozen=True)
class Options:
    """The widths that a group may take, ascending, the whole one last, and what each loses."""

    group: ChannelGroup
    widths: tuple[int, ...]
    losses: tuple[float, ...]


def width_options(
    narrower: Narrower, overrides: Overrides, track: Track = silent
) -> tuple[Options, ...]:
    """The widths that a budget may choose from.

    Args:
        narrower: The network's groups, with statistics.
        overrides: What the user fixed; groups that touch it are left.
        track: Progress.
    """
    free = [g for g in narrower.groups() if not any(map(overrides.fixes, g.modules))]
    found = []
    for group in track(free, "channels", len(free)):
        removal = narrower.removal(group.name)
        widths = _grid(group.size, overrides.config.round_to)
        found.append(Options(group, widths, tuple(removal.loss(w) for w in widths)))
    return tuple(found)


def _grid(size: int, round_to: int | None) -> tuple[int, ...]:
    multiple = round_to or (MULTIPLE if size >= WIDE else 1)
    steps = (math.ceil(size * step / GRID) for step in range(1, GRID))
    narrow = {rounded_up(step, multiple, size) for step in steps} - {size}
    return (*sorted(narrow), size)


@dataclass(frozen=True)
class _Layer:
    """One layer's candidates, and what they cost at parts ``i`` of its inputs and ``o`` of outputs.

    That is ``both i o + inputs i + inside + outputs o``, exactly.
    """

    candidates: tuple[Candidate, ...]
    loss: Floats
    both: Floats
    inputs: Floats
    inside: Floats
    outputs: Floats

    def priced(self, price: float, i: Floats, o: Floats) -> tuple[Floats, Floats]:
        """The least loss plus priced cost at some widths, and the cost of what gives it."""
        i, o = i[:, None], o[:, None]
        cost = self.both * i * o + self.inputs * i + self.inside + self.outputs * o
        value = self.loss + price * cost
        best = value.argmin(1)
        rows = np.arange(len(best))
        return value[rows, best], cost[rows, best]


@dataclass(frozen=True)
class Widths:
    """What a budget may do to widths.

    Attributes:
        options: The groups.
        sites: All layers, by name.
        found: Candidates of the layers that may be rewritten, by name.
        currency: What budgets are counted in.
    """

    options: tuple[Options, ...]
    sites: Mapping[str, LayerSite]
    found: Mapping[str, Sequence[Candidate]]
    currency: Currency

    def dearer(self, factors: Mapping[str, float]) -> Widths:
        """Widths whose losses are those of layers that lose more; see `Budgets.dearer`."""

        def changed(option: Options) -> Options:
            readers = [slot.name for slot in option.group.consumers]
            factor = max(factors.get(name, 1.0) for name in readers)
            return replace(option, losses=tuple(loss * factor for loss in option.losses))

        found = {
            n: [replace(c, loss=c.loss * factors.get(n, 1.0)) for c in candidates]
            for n, candidates in self.found.items()
        }
        return replace(self, options=tuple(map(changed, self.options)), found=found)

    def loss(self, pattern: Pattern) -> float:
        """What a pattern of widths loses, without any ranks."""
        losses = (
            o.losses[o.widths.index(pattern.get(o.group.name, o.group.size))] for o in self.options
        )
        return math.fsum(losses)

    def layer_widths(self, pattern: Pattern) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of every layer that a pattern makes narrower."""
        found: dict[str, list[int]] = {}
        for option in self.options:
            group = option.group
            gone = group.size - pattern.get(group.name, group.size)
            if not gone:
                continue
            for slots, sides in (
                (group.producers, (1,)), (group.through, (0, 1)), (group.consumers, (0,)),
            ):  # fmt: skip
                for slot in (s for s in slots if s.name in self.sites):
                    geometry = self.sites[slot.name].geometry
                    now = found.setdefault(slot.name, [geometry.in_channels, geometry.out_channels])
                    for side in sides:
                        now[side] -= gone * slot.places.shape[1]
        return {name: (now[0], now[1]) for name, now in found.items()}

    def patterns(self, room: float) -> list[Pattern]:
        """Patterns of widths near a budget, the one that changes nothing first.

        Args:
            room: What the layers may cost together.
        """
        search = _Search(self)
        full = np.array([len(o.widths) - 1 for o in self.options])
        seen: dict[tuple[int, ...], float] = {}

        def cost(price: float, start: NDArray[np.intp]) -> tuple[float, NDArray[np.intp]]:
            state, spent = search.settled(price, start)
            seen[tuple(state.tolist())] = spent
            return spent, state

        low, high, state = 0.0, search.scale, full
        for _ in range(60):
            spent, state = cost(high, state)
            if spent <= room:
                break
            low, high = high, high * 4
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2 if low == 0 else math.sqrt(low * high)
            spent, state = cost(middle, state)
            low, high = (low, middle) if spent <= room else (middle, high)
        cost(high, full)
        cost(low, full)
        nearest = sorted(seen, key=lambda s: abs(seen[s] - room))[:PATTERNS]
        found = [{}, *(self._pattern(state) for state in nearest)]
        return [p for i, p in enumerate(found) if p not in found[:i]]

    def narrowest(self) -> Pattern:
        """The pattern in which every group has its least width."""
        return {o.group.name: o.widths[0] for o in self.options}

    def _pattern(self, state: Sequence[int]) -> Pattern:
        return {
            o.group.name: o.widths[i]
            for o, i in zip(self.options, state, strict=True)
            if o.widths[i] < o.group.size
        }

    def candidates(self, pattern: Pattern) -> dict[str, list[Candidate]]:
        """The layers' candidates at their widths, with what they cost there."""
        widths = self.layer_widths(pattern)
        result = {}
        for name, candidates in self.found.items():
            if name not in widths:
                result[name] = list(candidates)
                continue
            site = narrowed_site(self.sites[name], widths[name])
            result[name] = [c for c in map(site_cost(site), candidates) if c is not None]
        return result

    def dense_cost(self, name: str, pattern: Pattern) -> float:
        """What a layer costs at its width, not rewritten."""
        width = self.layer_widths(pattern).get(name)
        site = self.sites[name] if width is None else narrowed_site(self.sites[name], width)
        return float(self.currency.size(site))


def site_cost(site: LayerSite):  # type: ignore[no-untyped-def]
    """Return what gives a candidate the cost that it has for a layer; None where it is no use."""

    def costed(candidate: Candidate) -> Candidate | None:
        if candidate.scheme == DENSE:
            return replace(candidate, macs=site.macs, params=site.params)
        limits = scheme_named(candidate.scheme).full_ranks(site.geometry)
        if any(r >= limit for r, limit in zip(candidate.ranks, limits, strict=True)):
            return None
        parts = stage_costs(site, candidate)
        macs = sum(p.macs for p in parts)
        params = sum(p.params for p in parts) + site.geometry.out_channels
        return replace(candidate, macs=macs, params=params)

    return costed


def stage_costs(site: LayerSite, candidate: Candidate) -> list[SchemeCost]:
    """What each layer of a candidate's chain costs, its weights alone."""
    chain = scheme_named(candidate.scheme).stages(site.geometry, candidate.ranks)
    macs = [0.0] * len(chain)
    for call in site.calls:
        size = call.size
        for index, stage in enumerate(chain):
            macs[index] += float(call.repeats) * stage.macs(size)
            size = stage.output_size(size)
    return [SchemeCost(round(m), stage.weight_numel) for m, stage in zip(macs, chain, strict=True)]


class _Search:
    """Coordinate descent over the groups' widths at a price."""

    def __init__(self, widths: Widths) -> None:
        self.widths, self.options = widths, widths.options
        self.losses = [np.array(o.losses) for o in self.options]
        self.parts = [np.array(o.widths) / o.group.size for o in self.options]
        touched = {
            s.name
            for o in self.options
            for s in (*o.group.producers, *o.group.through, *o.group.consumers)
            if s.name in widths.sites
        }
        names = sorted(touched | set(widths.found))
        self.layers = {name: self._layer(name) for name in names}
        # Of each layer, the groups that it reads with their shares of its inputs, and those that
        # it makes.
        self.reads: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
        self.makes: dict[str, list[int]] = {name: [] for name in names}
        self.around: list[list[str]] = []
        for index, option in enumerate(self.options):
            group = option.group
            around = []
            for slot in group.consumers:
                share = slot.places.numel() / widths.sites[slot.name].geometry.in_channels
                self.reads[slot.name].append((index, share))
                around.append(slot.name)
            for slot in (*group.producers, *group.through):
                if slot.name in widths.sites:
                    self.makes[slot.name].append(index)
                    around.append(slot.name)
            self.around.append(list(dict.fromkeys(around)))

    @cached_property
    def scale(self) -> float:
        """A price at which loss and cost are of one order."""
        cost = sum(float(layer.both.max()) for layer in self.layers.values())
        loss = max((float(losses[0]) for losses in self.losses), default=1.0)
        return 1e-6 * max(loss, 1e-30) / max(cost, 1.0)

    def _layer(self, name: str) -> _Layer:
        site = self.widths.sites[name]
        size = self.widths.currency.size
        dense = Candidate(DENSE, (), 0.0, site.macs, site.params)
        candidates = _front(self.widths.found.get(name, [dense]), self.widths.currency)
        columns = np.zeros((4, len(candidates)))
        each = site.geometry.groups > 1
        for k, candidate in enumerate(candidates):
            if candidate.scheme == DENSE:
                weights = float(size(SchemeCost(site.macs, site.geometry.weight_numel)))
                columns[3 if each else 0, k] = weights
            else:
                parts = [float(size(c)) for c in stage_costs(site, candidate)]
                columns[1, k], columns[3, k] = parts[0], parts[-1]
                columns[2, k] = sum(parts[1:-1])
            columns[3, k] += float(size(SchemeCost(0, site.geometry.out_channels)))
        loss = np.array([c.loss for c in candidates])
        return _Layer(tuple(candidates), loss, *columns)

    def _at(self, name: str, parts: Sequence[Floats]) -> tuple[Floats, Floats]:
        i = 1.0 + sum((s * (parts[g] - 1.0) for g, s in self.reads[name]), np.zeros(1))
        makes = self.makes[name]
        o = parts[makes[0]] if makes else np.ones(1)
        return np.broadcast_arrays(i, o)  # type: ignore[return-value]  # a tuple of two

    def settled(self, price: float, start: NDArray[np.intp]) -> tuple[NDArray[np.intp], float]:
        """Where no group alone gains by another width, begun from some widths; and its cost."""
        state = start.copy()
        parts = [p[[k]] for p, k in zip(self.parts, state, strict=True)]
        for _ in range(_ROUNDS):
            before = state.copy()
            for group, around in enumerate(self.around):
                tried = [*parts[:group], self.parts[group], *parts[group + 1 :]]
                value = self.losses[group].copy()
                for name in around:
                    value = value + self.layers[name].priced(price, *self._at(name, tried))[0]
                state[group] = int(value.argmin())
                parts[group] = self.parts[group][[state[group]]]
            if (state == before).all():
                break
        spent = sum(
            float(layer.priced(price, *self._at(name, parts))[1][0])
            for name, layer in self.layers.items()
        )
        return state, spent


def _front(candidates: Sequence[Candidate], currency: Currency) -> list[Candidate]:
    """The candidates that no other beats in loss and cost at once."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (currency.cost(c), c.loss)):
        if not kept or candidate.loss < kept[-1].loss:
            kept.append(candidate)
    return kept
