"""Widths of channel groups and ranks of layers under one budget.

A group's width multiplies the cost of every layer that makes, changes or reads its channels, and
the cost of a layer between two groups is a product of both widths. With a price on cost, widths
are found that no single group can improve (`compress.choose.descent`), and the price is bisected.
For the width patterns found nearest to the budget, ranks are then chosen exactly
(`compress.choose.knapsack`), and so for the network as it is: the pattern of least predicted loss
wins, so that widths never make a plan worse than ranks alone. From there on, patterns that differ
in one group or two are tried, as long as the bound of the price says that they may be better.

A layer's predicted loss at a rank is taken to be the same at all widths. It is, up to what the
channels taken out would have added to the layer's error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from compress.calibrate.removal import Narrower
from compress.choose.choices import rounded_up
from compress.choose.costs import Costs
from compress.choose.descent import Options, Search, State
from compress.choose.overrides import Overrides
from compress.network.sites import LayerSite
from compress.plan import NARROW, SLICE, Candidate
from compress.progress import Track, silent

# Widths that a group may take, beside its own.
GRID = 16
# Groups of at least so many channels take multiples of 8, as kernels for vectors of numbers do.
WIDE, MULTIPLE = 64, 8
# Steps of the price.
_BISECTIONS = 20
# Width patterns for which ranks are chosen exactly.
PATTERNS = 5

# Widths by group; those that are not named stay as they are.
Pattern = dict[str, int]


Grid = Callable[[int, int | None], tuple[int, ...]]


def width_options(
    narrower: Narrower, overrides: Overrides, track: Track = silent, grid: Grid | None = None
) -> tuple[Options, ...]:
    """The widths that a budget may choose from.

    Args:
        narrower: The network's groups, with statistics.
        overrides: What the user fixed; groups that touch it are left.
        track: Progress.
        grid: The widths of a group of some size, rounded to a multiple that may be given,
            ascending, its own last; by default 15 narrower ones.
    """
    grid = grid or _grid
    free = [g for g in narrower.groups() if not any(map(overrides.fixes, g.modules))]
    found = []
    for group in track(free, "channels", len(free)):
        removal = narrower.removal(group.name)
        widths = grid(group.size, overrides.config.round_to)
        losses = tuple(removal.loss(w) for w in widths)
        found.append(Options(group, widths, losses, narrower.way(group.name)))
    return tuple(found)


def _grid(size: int, round_to: int | None) -> tuple[int, ...]:
    multiple = round_to or (MULTIPLE if size >= WIDE else 1)
    steps = (math.ceil(size * step / GRID) for step in range(1, GRID))
    narrow = {rounded_up(step, multiple, size) for step in steps} - {size}
    return (*sorted(narrow), size)


@dataclass(frozen=True)
class Narrowed:
    """What becomes of a narrower layer: its inputs and outputs, and ``"narrow"`` or ``"slice"``."""

    width: tuple[int, int]
    way: str


@dataclass(frozen=True)
class Widths:
    """What a budget may do to widths.

    Attributes:
        options: The groups.
        sites: All layers, by name.
        found: Candidates of the layers that may be rewritten, by name.
        costs: What layers cost at their widths.
    """

    options: tuple[Options, ...]
    sites: Mapping[str, LayerSite]
    found: Mapping[str, Sequence[Candidate]]
    costs: Costs

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

    def narrowed(self, pattern: Pattern) -> dict[str, Narrowed]:
        """Every layer that a pattern makes narrower: a slice where any of its groups is one."""
        ways: dict[str, str] = {}
        for option in self.options:
            if pattern.get(option.group.name, option.group.size) < option.group.size:
                for name in option.group.modules:
                    ways[name] = SLICE if option.way == SLICE else ways.get(name, NARROW)
        widths = self.layer_widths(pattern)
        return {name: Narrowed(width, ways[name]) for name, width in widths.items()}

    @cached_property
    def search(self) -> Search:
        """What finds widths at a price."""
        return Search(self.options, self.sites, self.found, self.costs)

    def patterns(self, room: float) -> tuple[list[Pattern], float]:
        """Patterns of widths near a budget, the one that changes nothing first; and its price.

        Args:
            room: What the layers may cost together.
        """
        search = self.search
        full = np.array([len(o.widths) - 1 for o in self.options])
        seen: dict[tuple[int, ...], float] = {}

        def cost(price: float, start: State) -> tuple[float, State]:
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
        return [p for i, p in enumerate(found) if p not in found[:i]], high

    def beside(self, pattern: Pattern, price: float, room: float) -> list[tuple[float, Pattern]]:
        """Patterns that differ in one group or two, by how little they may lose, that one first.

        Args:
            pattern: Widths.
            price: Of cost, as `patterns` found it.
            room: What the layers may cost together.

        Returns:
            Bounds, which ranks chosen exactly cannot beat, and patterns.
        """
        state = np.array(
            [o.widths.index(pattern.get(o.group.name, o.group.size)) for o in self.options]
        )
        found = self.search.beside(price, state)
        return [(value - price * room, self._pattern(other.tolist())) for value, other in found]

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
            costed = self.costs.narrowed(self.sites[name], widths[name])
            result[name] = [c for c in map(costed, candidates) if c is not None]
        return result

    def fixed(self, pattern: Pattern) -> float:
        """What costs that has no candidates and whose cost may change with a width."""
        widths = self.layer_widths(pattern)
        touched = dict.fromkeys(name for o in self.options for name in o.group.modules)
        layers = sum(
            self.costs.dense(self.sites[name], widths.get(name))
            for name in touched
            if name in self.sites and name not in self.found
        )
        others = (
            float(self.costs.others(o.group, [pattern.get(o.group.name, o.group.size)])[0])
            for o in self.options
        )
        return layers + sum(others)
