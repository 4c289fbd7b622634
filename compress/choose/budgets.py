"""One budget over all layers, schemes and ranks at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from compress.calibrate.statistics import Calibration
from compress.choose.choices import (
    SchemeCost,
    break_even,
    kept,
    make_choice,
    problems,
    rounded_up,
    scheme_cost,
)
from compress.choose.knapsack import UnreachableBudgetError, allocate
from compress.choose.overrides import Overrides
from compress.config import RunConfig
from compress.errors import BudgetError
from compress.linalg.fit import Problem, grid_losses, rank_grid
from compress.linalg.schemes import OUTPUT, Ranks, scheme_named
from compress.network.sites import LayerSite
from compress.plan import DENSE, Candidate, Choice
from compress.progress import Track, silent

# How many ranks of a scheme a budget may choose from; fewer where each is a pair.
GRID_POINTS = 32
GRID_POINTS_PAIRS = 12

_MEASURES: dict[str, tuple[Callable[[SchemeCost], int], Callable[[Candidate], float]]] = {
    "macs": (lambda c: c.macs, lambda c: c.macs),
    "params": (lambda c: c.params, lambda c: c.params),
    # A rewrite that saves no MACs is not worth timing.
    "latency": (lambda c: c.macs, lambda c: c.seconds or 0.0),
}
BUDGET_RULES = ("macs", "params")


class Budgets:
    """All budgets of one rule over one set of candidates, which do not depend on the budget.

    Args:
        model: The network, norms folded.
        sites: Its layers.
        calibration: Their statistics.
        config: Rule (``macs`` where it is no budget), overrides, schemes.
        track: Progress.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: tuple[LayerSite, ...],
        calibration: Calibration,
        config: RunConfig,
        track: Track = silent,
    ) -> None:
        overrides, problem = Overrides(config, sites), problems(model, calibration, fitted=True)
        self.sites, self.overrides = sites, overrides
        self.rule = config.rule if config.rule in BUDGET_RULES else "macs"
        self.found = options(sites, overrides, config, problem, self.rule, track)
        dense = {site.name: float(getattr(site, self.rule)) for site in sites}
        self.total = sum(dense.values())
        self.fixed = sum(cost for name, cost in dense.items() if name not in self.found)

    def spend(self, fraction: float) -> list[Choice]:
        """Choose within a fraction of the dense cost; see `plan_within`."""
        return plan_within(
            self.sites, self.overrides, self.found, self.rule, fraction, self.total, self.fixed
        )

    def smallest(self) -> float:
        """The smallest fraction that can be reached."""
        cost = _MEASURES[self.rule][1]
        least = sum(min(cost(c) for c in found) for found in self.found.values())
        return (least + self.fixed) / max(self.total, 1.0)


def options(
    sites: tuple[LayerSite, ...],
    overrides: Overrides,
    config: RunConfig,
    problem: Callable[[LayerSite], Problem],
    rule: str,
    track: Track = silent,
) -> dict[str, list[Candidate]]:
    """Candidates of every layer that a budget may rewrite."""
    measure = _MEASURES[rule][0]
    free = [site for site in sites if overrides.kept(site) is None]
    return {
        site.name: candidates(
            site,
            problem(site),
            overrides.schemes(site),
            measure=measure,
            round_to=config.round_to,
            fixed=overrides.ranks(site),
        )
        for site in track(free, "plan", len(free))
    }


def plan_within(
    sites: tuple[LayerSite, ...],
    overrides: Overrides,
    found: Mapping[str, list[Candidate]],
    rule: str,
    fraction: float,
    dense_total: float,
    fixed_total: float = 0.0,
    why: str | None = None,
) -> list[Choice]:
    """Spend a budget: one choice per layer, the least summed loss within it.

    Args:
        sites: All layers.
        overrides: What the user fixed.
        found: The candidates by layer name.
        rule: ``"macs"``, ``"params"`` or ``"latency"``.
        fraction: The budget, of ``dense_total``.
        dense_total: Cost of the whole dense network.
        fixed_total: What the layers without candidates cost, and all else.
        why: The reason to record; by default the budget.
    """
    cost = _MEASURES[rule][1]
    names = list(found)
    try:
        picked = allocate([found[n] for n in names], fraction * dense_total - fixed_total, cost)
    except UnreachableBudgetError as error:
        smallest = (error.smallest + fixed_total) / dense_total
        raise BudgetError(
            f"--{rule} {fraction:g} cannot be reached: the smallest reachable fraction is "
            f"{math.ceil(smallest * 1e4) / 1e4:g}. Raise the budget to that, allow more schemes "
            "(--schemes) or free layers that --keep or --rank fixes."
        ) from error
    chosen = {name: found[name][i] for name, i in zip(names, picked, strict=True)}
    measure = _MEASURES[rule][0]
    choices = []
    for site in sites:
        candidate = chosen.get(site.name)
        if candidate is None:
            choices.append(kept(site, overrides.kept(site) or "no candidate"))
            continue
        by_scheme = candidate.scheme if candidate.scheme != DENSE else OUTPUT.name
        limit = break_even(site, by_scheme, measure) if site.geometry.full_rank > 1 else 0
        reason = why or f"best within {rule} {fraction:g}"
        if candidate.scheme == DENSE:
            saved = {"latency": "time"}.get(rule, rule)
            reason = f"{reason}: every rewrite costs more accuracy than it saves {saved}"
        choices.append(make_choice(site, candidate.scheme, candidate.ranks, reason, limit))
    return choices


def candidates(
    site: LayerSite,
    problem: Problem,
    schemes: Iterable[str],
    *,
    measure: Callable[[SchemeCost], int] = lambda c: c.macs,
    round_to: int | None = None,
    fixed: Ranks | None = None,
) -> list[Candidate]:
    """What may become of a layer: dense, and every scheme at a grid of ranks that saves.

    A candidate's loss is its predicted increase of the objective per image,
    ``½ N tr(G Δ C Δᵀ)`` with ``N`` output positions.
    """
    found = [] if fixed else [Candidate(DENSE, (), 0.0, site.macs, site.params)]
    dense = measure(scheme_cost(site, DENSE, ()))
    for scheme in schemes:
        full = scheme_named(scheme).full_ranks(site.geometry)
        if fixed is not None:
            if len(fixed) != len(full):
                continue
            grid = [min(fixed[0], full[0])]
        else:
            grid = _grid(site, scheme, full, measure, round_to)
        for ranks, loss in grid_losses(problem, scheme, grid).items():
            if fixed is not None and len(fixed) == 2 and ranks[1] != min(fixed[1], full[1]):
                continue
            rounded = round_to if fixed is None else None  # what the user fixed stays
            if rounded and any(r % rounded and r != f for r, f in zip(ranks, full, strict=True)):
                continue
            cost = scheme_cost(site, scheme, ranks)
            if fixed is not None or measure(cost) < dense:
                predicted = 0.5 * site.positions * loss
                found.append(Candidate(scheme, ranks, predicted, cost.macs, cost.params))
    problem.release()
    return found


def _grid(
    site: LayerSite,
    scheme: str,
    full: Ranks,
    measure: Callable[[SchemeCost], int],
    round_to: int | None,
) -> list[int]:
    if len(full) == 2:
        grid = rank_grid(full[0], GRID_POINTS_PAIRS)
    elif scheme_named(scheme).closed_form:  # the loss of every rank is known at once
        grid = list(range(1, break_even(site, scheme, measure) + 1))
    else:
        grid = rank_grid(break_even(site, scheme, measure), GRID_POINTS)
    if round_to:
        grid = sorted({rounded_up(r, round_to, full[0]) for r in grid})
    return grid
