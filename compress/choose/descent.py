"""Widths of groups that no single group can improve at a price on cost.

With a price (Lagrange's multiplier), groups are visited in turn and each takes the width that is
best while all others stay as they are and every layer answers with its best rank; that is repeated
until none changes (coordinate descent).

Loss plus priced cost, less the priced budget, is a bound: no ranks at these widths lose less within
the budget. So it also tells which other widths are worth trying.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from compress.choose.costs import AtParts, Costs, Floats
from compress.network.channels import ChannelGroup
from compress.network.sites import LayerSite
from compress.plan import DENSE, NARROW, Candidate
from compress.rules import Currency

# Rounds of visits at each price.
_ROUNDS = 8
# Of the moves of one group, those that are tried two at a time.
_PAIRED = 12

# Of each group, the index of its width among those that it may take.
State = NDArray[np.intp]


@dataclass(frozen=True)
class Options:
    """The widths that a group may take, ascending, the whole one last, and what each loses.

    With the way in which it is cut, ``"narrow"`` or ``"slice"``.
    """

    group: ChannelGroup
    widths: tuple[int, ...]
    losses: tuple[float, ...]
    way: str = NARROW


@dataclass(frozen=True)
class _Layer:
    """One layer's candidates: what they lose, and what they cost at parts of its width."""

    loss: Floats
    cost: AtParts

    def priced(self, price: float, i: Floats, o: Floats) -> tuple[Floats, Floats]:
        """The least loss plus priced cost at some widths, and the cost of what gives it."""
        cost = self.cost(i, o)
        value = self.loss + price * cost
        best = value.argmin(1)
        rows = np.arange(len(best))
        return value[rows, best], cost[rows, best]


class Search:
    """Coordinate descent over the groups' widths at a price."""

    def __init__(
        self,
        options: Sequence[Options],
        sites: Mapping[str, LayerSite],
        found: Mapping[str, Sequence[Candidate]],
        costs: Costs,
    ) -> None:
        self.options, self.sites, self.found, self.costs = options, sites, found, costs
        self.losses = [np.array(o.losses) for o in self.options]
        self.parts = [np.array(o.widths) / o.group.size for o in self.options]
        self.others = [costs.others(o.group, o.widths) for o in self.options]
        touched = {
            s.name
            for o in self.options
            for s in (*o.group.producers, *o.group.through, *o.group.consumers)
            if s.name in sites
        }
        names = sorted(touched | set(found))
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
                share = slot.places.numel() / sites[slot.name].geometry.in_channels
                self.reads[slot.name].append((index, share))
                around.append(slot.name)
            for slot in (*group.producers, *group.through):
                if slot.name in sites:
                    self.makes[slot.name].append(index)
                    around.append(slot.name)
            self.around.append(list(dict.fromkeys(around)))

    @cached_property
    def scale(self) -> float:
        """A price at which loss and cost are of one order."""
        whole = np.ones(1)
        cost = sum(float(layer.cost(whole, whole).max()) for layer in self.layers.values())
        loss = max((float(losses[0]) for losses in self.losses), default=1.0)
        return 1e-6 * max(loss, 1e-30) / max(cost, 1e-30)

    def _layer(self, name: str) -> _Layer:
        site = self.sites[name]
        seconds = self.costs.dense(site, None)
        dense = Candidate(DENSE, (), 0.0, site.macs, site.params, seconds)
        candidates = _front(self.found.get(name, [dense]), self.costs.currency)
        loss = np.array([c.loss for c in candidates])
        return _Layer(loss, self.costs.at_parts(site, candidates))

    def _at(self, name: str, parts: Sequence[Floats]) -> tuple[Floats, Floats]:
        i = 1.0 + sum((s * (parts[g] - 1.0) for g, s in self.reads[name]), np.zeros(1))
        makes = self.makes[name]
        o = parts[makes[0]] if makes else np.ones(1)
        return np.broadcast_arrays(i, o)  # type: ignore[return-value]  # a tuple of two

    def settled(self, price: float, start: State) -> tuple[State, float]:
        """Where no group alone gains by another width, begun from some widths; and its cost."""
        state = start.copy()
        parts = [p[[k]] for p, k in zip(self.parts, state, strict=True)]
        for _ in range(_ROUNDS):
            before = state.copy()
            for group, around in enumerate(self.around):
                tried = [*parts[:group], self.parts[group], *parts[group + 1 :]]
                value = self.losses[group] + price * self.others[group]
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
        spent += sum(float(cost[k]) for cost, k in zip(self.others, state, strict=True))
        return state, spent

    def beside(self, price: float, state: State) -> list[tuple[float, State]]:
        """Other widths of one group, or of two, with loss plus priced cost; the least first."""
        parts = [p[[k]] for p, k in zip(self.parts, state, strict=True)]
        now = {n: self.layers[n].priced(price, *self._at(n, parts))[0][0] for n in self.layers}
        priced = [losses + price * c for losses, c in zip(self.losses, self.others, strict=True)]
        lost = [float(values[k]) for values, k in zip(priced, state, strict=True)]
        whole = sum(now.values()) + sum(lost)
        singles: list[tuple[float, State]] = []
        for group, around in enumerate(self.around):
            tried = [*parts[:group], self.parts[group], *parts[group + 1 :]]
            value = priced[group] + (whole - lost[group] - sum(now[n] for n in around))
            for name in around:
                value = value + self.layers[name].priced(price, *self._at(name, tried))[0]
            singles += [
                (float(v), _with(state, group, k)) for k, v in enumerate(value) if k != state[group]
            ]
        singles.sort(key=lambda found: found[0])
        pairs = [(self._value(price, both), both) for both in _pairs(state, singles[:_PAIRED])]
        return sorted([*singles, *pairs], key=lambda found: found[0])

    def _value(self, price: float, state: State) -> float:
        parts = [p[[k]] for p, k in zip(self.parts, state, strict=True)]
        lost = sum(
            float(losses[k] + price * cost[k])
            for losses, cost, k in zip(self.losses, self.others, state, strict=True)
        )
        return lost + sum(
            float(layer.priced(price, *self._at(name, parts))[0][0])
            for name, layer in self.layers.items()
        )


def _with(state: State, group: int, width: int) -> State:
    changed = state.copy()
    changed[group] = width
    return changed


def _pairs(state: State, moves: Sequence[tuple[float, State]]) -> Iterator[State]:
    """Every two moves of different groups at once."""
    for (_, first), (_, second) in itertools.combinations(moves, 2):
        one, other = first != state, second != state
        if not (one & other).any():
            yield np.where(one, first, second)


def _front(candidates: Sequence[Candidate], currency: Currency) -> list[Candidate]:
    """The candidates that no other beats in loss and cost at once."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (currency.cost(c), c.loss)):
        if not kept or candidate.loss < kept[-1].loss:
            kept.append(candidate)
    return kept
