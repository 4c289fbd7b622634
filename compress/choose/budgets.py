"""One budget over all layers, schemes and ranks at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from compress.choose.choices import break_even, kept, make_choice, rounded_up, scheme_cost
from compress.choose.knapsack import UnreachableBudgetError, allocate
from compress.choose.overrides import Latitude, Overrides
from compress.choose.widths import Narrowed, Pattern, Widths
from compress.errors import BudgetError
from compress.linalg.fit import Problem, grid_losses, rank_grid
from compress.linalg.schemes import OUTPUT, scheme_named
from compress.network.sites import LayerSite
from compress.plan import DENSE, Candidate, Choice
from compress.progress import Track, silent
from compress.rules import Currency, Sized

# How many ranks of a scheme a budget may choose from; fewer where each is a pair.
GRID_POINTS = 32
GRID_POINTS_PAIRS = 12
# Width patterns for which ranks are chosen exactly, at most.
MOST_PATTERNS = 20

Size = Callable[[Sized], int]


@dataclass(frozen=True)
class _Spent:
    """A way to spend a budget: widths, a candidate of each layer, and the predicted loss."""

    pattern: Pattern
    chosen: dict[str, Candidate]
    loss: float


@dataclass(frozen=True)
class Budgets:
    """All budgets in one currency over one set of candidates, which do not depend on the budget.

    Attributes:
        sites: All layers.
        overrides: What the user fixed.
        found: Candidates by layer name.
        currency: What budgets are counted in.
        total: Cost of the whole dense network.
        fixed: What the layers without candidates cost, and all else.
        elsewhere: What is none of the layers, by module; for messages.
        why: The reason that choices record; by default the budget.
        widths: What may become narrower; None where nothing may.
    """

    sites: tuple[LayerSite, ...]
    overrides: Overrides
    found: Mapping[str, list[Candidate]]
    currency: Currency
    total: float
    fixed: float
    why: str | None = None
    elsewhere: Mapping[str, float] = field(default_factory=dict)
    widths: Widths | None = None

    def spend(self, fraction: float) -> list[Choice]:
        """Make one choice per layer: the least summed loss within a fraction of the dense cost.

        Raises:
            BudgetError: The fraction cannot be reached; the smallest reachable one is named.
        """
        room = fraction * self.total - self.fixed
        best = self._ranked({}, room) if self.widths is None or fraction >= 1 else self._wide(room)
        if best is None:
            raise self._unreachable(fraction, self.smallest() * self.total - self.fixed)
        narrowed = {} if self.widths is None else self.widths.narrowed(best.pattern)
        why = self.why or f"best within {self.currency.name} {fraction:g}"
        return [
            self._choice(site, best.chosen.get(site.name), narrowed.get(site.name), why)
            for site in self.sites
        ]

    def _wide(self, room: float) -> _Spent | None:
        """Widths and ranks within a budget, or None where there are none."""
        assert self.widths is not None
        whole = room + self._fixed_layers({})
        patterns, price = self.widths.patterns(whole)
        spent = [s for s in (self._ranked(pattern, room) for pattern in patterns) if s is not None]
        if not spent:  # where hardly anything is left, a layer may be too narrow to be factored
            return self._ranked(self.widths.narrowest(), room)
        best, tried = min(spent, key=lambda s: s.loss), patterns
        while len(tried) < MOST_PATTERNS:
            better = None
            for bound, pattern in self.widths.beside(best.pattern, price, whole):
                if bound >= best.loss or len(tried) >= MOST_PATTERNS:
                    break
                if pattern in tried:
                    continue
                tried = [*tried, pattern]
                other = self._ranked(pattern, room)
                if other is not None and other.loss < best.loss:
                    better = best = other
                    break
            if better is None:
                break
        return best

    def _ranked(self, pattern: Pattern, room: float) -> _Spent | None:
        """Ranks within a budget at some widths, or None where there are none."""
        found: Mapping[str, list[Candidate]] = self.found
        loss = 0.0
        if pattern and self.widths is not None:
            found, loss = self.widths.candidates(pattern), self.widths.loss(pattern)
        names = list(found)
        room += self._fixed_layers({}) - self._fixed_layers(pattern)
        try:
            picked = allocate([found[n] for n in names], room, self.currency.cost)
        except UnreachableBudgetError:
            return None
        chosen = {name: found[name][i] for name, i in zip(names, picked, strict=True)}
        return _Spent(pattern, chosen, loss + math.fsum(c.loss for c in chosen.values()))

    def _fixed_layers(self, pattern: Pattern) -> float:
        """What costs that has no candidates and whose cost may change with a width."""
        return 0.0 if self.widths is None else self.widths.fixed(pattern)

    def smallest(self) -> float:
        """The smallest fraction that can be reached."""
        cost = self.currency.cost
        found: Mapping[str, list[Candidate]] = self.found
        fixed = self.fixed
        if self.widths is not None:
            pattern = self.widths.narrowest()
            found = self.widths.candidates(pattern)
            fixed += self._fixed_layers(pattern) - self._fixed_layers({})
        least = sum(min(cost(c) for c in candidates) for candidates in found.values())
        return (least + fixed) / self.total if self.total else 0.0

    def dearer(self, factors: Mapping[str, float]) -> Budgets:
        """Return budgets in which some layers lose more than was predicted.

        Args:
            factors: How much more, by layer.
        """
        found = {
            name: [replace(c, loss=c.loss * factors.get(name, 1.0)) for c in candidates]
            for name, candidates in self.found.items()
        }
        widths = self.widths and self.widths.dearer(factors)
        return replace(self, found=found, widths=widths)

    def _choice(
        self, site: LayerSite, candidate: Candidate | None, narrowed: Narrowed | None, why: str
    ) -> Choice:
        if narrowed is not None:
            if candidate is None or candidate.scheme == DENSE:
                return make_choice(site, narrowed.way, (), why, 0, narrowed.width)
            return make_choice(site, candidate.scheme, candidate.ranks, why, 0, narrowed.width)
        if candidate is None:
            return kept(site, self.overrides.kept(site) or "no candidate")
        by_scheme = candidate.scheme if candidate.scheme != DENSE else OUTPUT.name
        limit = 0
        if site.geometry.full_rank > 1:
            limit = break_even(site, by_scheme, self.currency.size)
        if candidate.scheme == DENSE:
            costly = f"{why}: every rewrite costs more accuracy than it saves {self.currency.saved}"
            why = self.overrides.unsuited(site) or costly
        return make_choice(site, candidate.scheme, candidate.ranks, why, limit)

    def _unreachable(self, fraction: float, least: float) -> BudgetError:
        smallest = (least + self.fixed) / self.total
        return BudgetError(
            f"--{self.currency.name} {fraction:g} cannot be reached: the smallest reachable "
            f"fraction is {math.ceil(smallest * 1e4) / 1e4:g}. Raise the budget to that, allow "
            "more schemes (--schemes) or free layers that --keep or --rank fixes."
            f"{self._in_the_way()}"
        )

    def _in_the_way(self) -> str:
        """Name the largest parts of the network that no candidate makes smaller."""
        kept = [site for site in self.sites if site.name not in self.found]
        cost = {**self.elsewhere, **{s.name: float(self.currency.size(s)) for s in kept}}
        fixed = {name: c for name, c in cost.items() if c >= 0.01 * self.total}
        largest = sorted(fixed, key=lambda name: -fixed[name])[:3]
        if not largest:
            return ""
        parts = (f"{n or 'the model itself'} ({100 * fixed[n] / self.total:.0f}%)" for n in largest)
        return f" What cannot be rewritten: {', '.join(parts)}."


def options(
    sites: tuple[LayerSite, ...],
    overrides: Overrides,
    problem: Callable[[LayerSite], Problem],
    size: Size,
    track: Track = silent,
) -> dict[str, list[Candidate]]:
    """Candidates of every layer that a budget may rewrite; ``size`` as for `candidates`."""
    free = [site for site in sites if overrides.kept(site) is None]
    return {
        site.name: candidates(site, problem(site), overrides.latitude(site), size)
        for site in track(free, "plan", len(free))
    }


def candidates(
    site: LayerSite, problem: Problem, latitude: Latitude, size: Size = lambda sized: sized.macs
) -> list[Candidate]:
    """What may become of a layer: dense, and every scheme at a grid of ranks that saves.

    A candidate's loss is its predicted increase of the objective per image,
    ``½ N tr(G Δ C Δᵀ)`` with ``N`` output positions.

    Args:
        site: The layer.
        problem: The same in its data's metric; what it has cached is released.
        latitude: The schemes and ranks to choose from.
        size: What a rewrite must have less of than the layer, unless that is forced.
    """
    fixed = latitude.ranks
    dense = Candidate(DENSE, (), 0.0, site.macs, site.params)
    found = []
    for scheme in latitude.schemes:
        full = scheme_named(scheme).full_ranks(site.geometry)
        if fixed is not None and len(fixed) != len(full):
            continue
        grid = [min(fixed[0], full[0])] if fixed else _grid(site, scheme, latitude.round_to, size)
        second = min(fixed[1], full[1]) if fixed and len(fixed) > 1 else None
        for ranks, loss in grid_losses(problem, scheme, grid, second=second).items():
            if not latitude.allows(ranks, full):
                continue
            cost = scheme_cost(site, scheme, ranks)
            if latitude.forced or size(cost) < size(site):
                predicted = 0.5 * site.positions * loss
                found.append(Candidate(scheme, ranks, predicted, cost.macs, cost.params))
    problem.release()
    # Ranks that the user fixed are taken, unless none of the schemes saves anything at them.
    return found if fixed and found else [dense, *found]


def _grid(site: LayerSite, name: str, round_to: int | None, size: Size) -> list[int]:
    """First ranks worth considering."""
    scheme = scheme_named(name)
    full = scheme.full_ranks(site.geometry)
    if scheme.cored:
        grid = rank_grid(full[0], GRID_POINTS_PAIRS)
    elif scheme.closed_form:  # the loss of every rank is known at once
        grid = list(range(1, break_even(site, name, size) + 1))
    else:
        grid = rank_grid(break_even(site, name, size), GRID_POINTS)
    if round_to:
        grid = sorted({rounded_up(r, round_to, full[0]) for r in grid})
    return grid
