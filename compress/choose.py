"""Choosing a scheme and a rank for every layer: rules, overrides, break-even, budgets."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from compress.allocate import (
    UnreachableBudgetError,
    allocate,
    rank_by_energy,
    rank_by_threshold,
)
from compress.calibrate import Calibration, layer_problem
from compress.config import RunConfig
from compress.errors import BudgetError, ConfigError, PlanError, near_matches
from compress.linalg.fit import Problem, grid_losses, rank_grid
from compress.linalg.schemes import Ranks, chain_macs, chain_params, full_ranks, stages, unavailable
from compress.plan import DENSE, Candidate, Choice, Plan
from compress.sites import LayerSite

# How many ranks of a scheme a budget may choose from, by the cost of evaluating one.
GRID_POINTS = 32
GRID_POINTS_PAIRS = 12


@dataclass(frozen=True)
class SchemeCost:
    """MACs per image and parameters of one layer under a scheme at given ranks."""

    macs: int
    params: int


def scheme_cost(site: LayerSite, scheme: str, ranks: Ranks) -> SchemeCost:
    """Cost of a layer rewritten by a scheme; ``dense`` is the layer as it is."""
    if scheme == DENSE:
        return SchemeCost(site.macs, site.params)
    chain = stages(site.geometry, scheme, ranks)
    macs = site.count_macs(lambda call: chain_macs(chain, call.size))
    return SchemeCost(macs, chain_params(chain))


def break_even(site: LayerSite, scheme: str, measure: Callable[[SchemeCost], int]) -> int:
    """Largest rank at which a scheme of one rank still saves; 0 where none does."""
    dense = measure(scheme_cost(site, DENSE, ()))
    low, high = 0, full_ranks(site.geometry, scheme)[0] + 1
    while high - low > 1:
        middle = (low + high) // 2
        ranks = (middle,) * len(full_ranks(site.geometry, scheme))
        saves = measure(scheme_cost(site, scheme, ranks)) < dense
        low, high = (middle, high) if saves else (low, middle)
    return low


class Overrides:
    """What the user fixed by glob: layers to keep, schemes, ranks.

    Raises:
        ConfigError: A glob that matches no layer (with near matches), a scheme that a layer
            cannot take, ranks that do not suit it, or a layer both kept and ranked.
    """

    def __init__(self, config: RunConfig, sites: Iterable[LayerSite]) -> None:
        self.config = config
        self.sites = {site.name: site for site in sites}
        for what, patterns in (
            ("keep", config.keep),
            ("scheme", config.scheme),
            ("rank", config.rank),
        ):
            for pattern in patterns:
                if not any(self._matches(pattern, site) for site in self.sites.values()):
                    raise ConfigError(
                        f"--{what} {pattern!r} matches no layer."
                        f"{near_matches(pattern, self.sites)} `compress inspect` lists the layers."
                    )
        for site in self.sites.values():
            self._check(site)

    @staticmethod
    def _matches(pattern: str, site: LayerSite) -> bool:
        return any(fnmatch.fnmatchcase(alias, pattern) for alias in site.aliases)

    def _last(self, patterns: Mapping[str, str], site: LayerSite) -> str | None:
        found = [value for pattern, value in patterns.items() if self._matches(pattern, site)]
        return found[-1] if found else None

    def kept(self, site: LayerSite) -> str | None:
        """The reason to keep a layer, or None."""
        if site.skip is not None:
            return site.skip
        if any(self._matches(p, site) for p in self.config.keep):
            return "kept on request"
        return "kept on request" if self._last(self.config.scheme, site) == DENSE else None

    def scheme(self, site: LayerSite) -> str | None:
        """The scheme asked for, or None."""
        return self._last(self.config.scheme, site)

    def ranks(self, site: LayerSite) -> Ranks | None:
        """The ranks asked for, or None."""
        text = self._last(self.config.rank, site)
        return None if text is None else tuple(int(part) for part in text.split(","))

    def schemes(self, site: LayerSite) -> tuple[str, ...]:
        """The schemes in play for a layer."""
        asked = self.scheme(site)
        allowed = self.config.schemes if asked is None else (asked,)
        return tuple(s for s in site.schemes if s in allowed)

    def _check(self, site: LayerSite) -> None:
        scheme, ranks = self.scheme(site), self.ranks(site)
        if site.skip is not None:
            return
        if scheme not in (None, DENSE):
            reason = unavailable(site.geometry, str(scheme))
            exact = any(p in site.aliases for p in self.config.scheme)
            if reason is not None and exact:
                raise ConfigError(f"Layer {site.name!r} cannot take {scheme!r}: {reason}.")
        if ranks is None:
            return
        if any(self._matches(p, site) for p in self.config.keep):
            raise ConfigError(f"Layer {site.name!r} is both kept and given a rank.")
        wanted = scheme or ("two_sided" if len(ranks) == 2 else "output")
        if wanted != DENSE and len(ranks) != len(full_ranks(site.geometry, wanted)):
            raise ConfigError(
                f"Layer {site.name!r} takes {len(full_ranks(site.geometry, wanted))} rank(s) in "
                f"scheme {wanted!r}; --rank gives {len(ranks)}."
            )


def make_plan(
    model: nn.Module,
    sites: tuple[LayerSite, ...],
    calibration: Calibration,
    config: RunConfig,
) -> Plan:
    """Choose for every layer by the configuration's rule.

    Args:
        model: The network, norms folded.
        sites: Its layers.
        calibration: Their statistics.
        config: Rule, overrides, schemes.

    Raises:
        BudgetError: The budget cannot be reached; the smallest reachable fraction is named.
        ConfigError: Overrides that fit no layer.
    """
    if config.rule in ("threshold", "energy", "rank"):
        overrides, problem = Overrides(config, sites), problems(model, calibration)
        choices = [_by_spectrum(site, overrides, config, problem) for site in sites]
    elif config.rule in _MEASURES:
        choices = Budgets(model, sites, calibration, config).spend(config.rule_value or 0.0)
    else:
        raise ConfigError(f"the {config.rule} rule needs the validation images, not a plan alone")
    return Plan(config.rule, config.rule_value, config.metric, tuple(choices))


def problems(model: nn.Module, calibration: Calibration) -> Callable[[LayerSite], Problem]:
    """Return what makes a layer's problem from its statistics."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return lambda site: layer_problem(site, modules[site.name], calibration.statistics[site.name])


def kept(site: LayerSite, reason: str) -> Choice:
    """The choice to leave a layer as it is."""
    return _choice(site, DENSE, (), reason, 0)


def _choice(site: LayerSite, scheme: str, ranks: Ranks, reason: str, limit: int) -> Choice:
    cost = scheme_cost(site, scheme, ranks)
    full = site.geometry.full_rank if scheme == DENSE else full_ranks(site.geometry, scheme)[0]
    return Choice(
        name=site.name,
        kind=site.kind,
        shape=site.shape,
        scheme=scheme,
        ranks=ranks,
        reason=reason,
        macs=cost.macs,
        params=cost.params,
        dense_macs=site.macs,
        dense_params=site.params,
        break_even=limit,
        full_rank=full,
    )


def _by_spectrum(
    site: LayerSite,
    overrides: Overrides,
    config: RunConfig,
    problem: Callable[[LayerSite], Problem],
) -> Choice:
    """Threshold, energy or a rank by hand: one layer at a time."""
    reason = overrides.kept(site)
    if reason is not None:
        return kept(site, reason)
    asked = overrides.ranks(site)
    scheme = overrides.scheme(site) or ("two_sided" if asked and len(asked) == 2 else "output")
    if asked is None and config.rule == "rank":
        return kept(site, "no rank given")
    if asked is None and (scheme != "output" or scheme not in config.schemes):
        return kept(site, f"the {config.rule} rule chooses ranks for the output scheme alone")
    if unavailable(site.geometry, scheme) is not None:
        return kept(site, f"{scheme}: {unavailable(site.geometry, scheme)}")
    full = full_ranks(site.geometry, scheme)
    if asked is None:
        spectra = [s.tolist() for s in problem(site).plain_spectrum]
        by_rule = rank_by_threshold if config.rule == "threshold" else rank_by_energy
        value = config.rule_value or 0.0
        rank = max(by_rule(s, value) for s in spectra)
        asked = (_rounded(rank, config.round_to, full[0]),)
        why = f"{config.rule} {value:g} keeps {rank} of {len(spectra[0])}"
    else:
        asked = tuple(min(r, limit) for r, limit in zip(asked, full, strict=True))
        why = f"rank {','.join(map(str, asked))} given"
    return _unless_it_costs(site, scheme, asked, why, config.force_rank and overrides.ranks(site))


def _unless_it_costs(
    site: LayerSite, scheme: str, ranks: Ranks, why: str, forced: object
) -> Choice:
    """Rewrite where that saves MACs or parameters and does not cost the other."""
    cost = scheme_cost(site, scheme, ranks)
    by_macs = break_even(site, scheme, lambda c: c.macs)
    by_params = break_even(site, scheme, lambda c: c.params)
    limit = min(by_macs, by_params)
    saves = cost.macs < site.macs or cost.params < site.params
    costs = cost.macs > site.macs or cost.params > site.params
    if saves and not costs:
        return _choice(site, scheme, ranks, why, limit)
    beyond = f"{why}, beyond break-even ({limit})"
    if forced:
        return _choice(site, scheme, ranks, beyond + ", forced", limit)
    return _choice(site, DENSE, (), beyond + ": rewriting would save nothing", limit)


def _rounded(rank: int, multiple: int | None, full: int) -> int:
    """Round a rank up to a multiple, at most full."""
    return rank if multiple is None else min(full, math.ceil(rank / multiple) * multiple)


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
        full = full_ranks(site.geometry, scheme)
        if fixed is not None:
            if len(fixed) != len(full):
                continue
            grid = [min(fixed[0], full[0])]
        else:
            grid = _grid(site, scheme, full, measure, round_to)
        for ranks, loss in grid_losses(problem, scheme, grid).items():
            if fixed is not None and len(fixed) == 2 and ranks[1] != min(fixed[1], full[1]):
                continue
            if round_to and any(r % round_to and r != f for r, f in zip(ranks, full, strict=True)):
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
    elif scheme == "output":
        grid = list(range(1, break_even(site, scheme, measure) + 1))
    else:
        grid = rank_grid(break_even(site, scheme, measure), GRID_POINTS)
    if round_to:
        grid = sorted({_rounded(r, round_to, full[0]) for r in grid})
    return grid


_MEASURES: dict[str, tuple[Callable[[SchemeCost], int], Callable[[Candidate], float]]] = {
    "macs": (lambda c: c.macs, lambda c: c.macs),
    "params": (lambda c: c.params, lambda c: c.params),
}


def options(
    sites: tuple[LayerSite, ...],
    overrides: Overrides,
    config: RunConfig,
    problem: Callable[[LayerSite], Problem],
    rule: str,
) -> dict[str, list[Candidate]]:
    """Candidates of every layer that a budget may rewrite."""
    measure = _MEASURES[rule][0]
    return {
        site.name: candidates(
            site,
            problem(site),
            overrides.schemes(site),
            measure=measure,
            round_to=config.round_to,
            fixed=overrides.ranks(site),
        )
        for site in sites
        if overrides.kept(site) is None
    }


def plan_within(
    sites: tuple[LayerSite, ...],
    overrides: Overrides,
    found: Mapping[str, list[Candidate]],
    rule: str,
    fraction: float,
    dense_total: float,
    fixed_total: float = 0.0,
) -> list[Choice]:
    """Spend a budget: one choice per layer, the least summed loss within it.

    Args:
        sites: All layers.
        overrides: What the user fixed.
        found: The candidates by layer name.
        rule: ``"macs"`` or ``"params"``.
        fraction: The budget, of ``dense_total``.
        dense_total: Cost of the whole dense network.
        fixed_total: What the layers without candidates cost, and all else.
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
        by_scheme = candidate.scheme if candidate.scheme != DENSE else "output"
        limit = break_even(site, by_scheme, measure) if site.geometry.full_rank > 1 else 0
        why = f"best within {rule} {fraction:g}"
        if candidate.scheme == DENSE:
            why = f"{why}: every rewrite costs more accuracy than it saves {rule}"
        choices.append(_choice(site, candidate.scheme, candidate.ranks, why, limit))
    return choices


class Budgets:
    """All budgets of one rule over one set of candidates, which do not depend on the budget.

    Args:
        model: The network, norms folded.
        sites: Its layers.
        calibration: Their statistics.
        config: Rule (``macs`` where it is no budget), overrides, schemes.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: tuple[LayerSite, ...],
        calibration: Calibration,
        config: RunConfig,
    ) -> None:
        overrides, problem = Overrides(config, sites), problems(model, calibration)
        self.sites, self.overrides = sites, overrides
        self.rule = config.rule if config.rule in _MEASURES else "macs"
        self.found = options(sites, overrides, config, problem, self.rule)
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


def check_plan(plan: Plan, sites: tuple[LayerSite, ...]) -> Plan:
    """Fit a plan, perhaps edited, to the model: costs and limits made anew.

    Raises:
        PlanError: It names a layer that the model lacks, lacks one that the model has, or asks a
            layer for what it cannot be; all problems are listed.
    """
    by_name = {site.name: site for site in sites}
    problems = []
    choices = []
    for choice in plan.choices:
        site = by_name.pop(choice.name, None)
        if site is None:
            problems.append(f"no layer {choice.name!r} in the model")
            continue
        problem = _misfit(choice, site)
        if problem is not None:
            problems.append(f"layer {choice.name!r}: {problem}")
            continue
        choices.append(_choice(site, choice.scheme, choice.ranks, choice.reason, choice.break_even))
    problems += [f"layer {name!r} is missing from the plan" for name in by_name]
    if problems:
        shown = "; ".join(problems[:20])
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise PlanError(f"The plan does not fit the model: {shown}{more}.")
    order = {site.name: i for i, site in enumerate(sites)}
    choices.sort(key=lambda c: order[c.name])
    return Plan(
        plan.rule, plan.value, plan.metric, tuple(choices),
        plan.model, plan.source_sha256, plan.calibration,
    )  # fmt: skip


def _misfit(choice: Choice, site: LayerSite) -> str | None:
    if choice.shape != site.shape or choice.kind != site.kind:
        return f"the plan has {choice.kind} {choice.shape}, the model {site.kind} {site.shape}"
    if choice.scheme == DENSE:
        return None if not choice.ranks else "a dense layer has no ranks"
    if site.skip is not None:
        return f"it cannot be rewritten: {site.skip}"
    if choice.scheme not in site.schemes:
        names = (*site.schemes, DENSE)
        return f"no scheme {choice.scheme!r} for it ({', '.join(names)})" + near_matches(
            choice.scheme, names
        )
    full = full_ranks(site.geometry, choice.scheme)
    if len(choice.ranks) != len(full):
        return f"scheme {choice.scheme!r} takes {len(full)} rank(s), not {len(choice.ranks)}"
    if any(not 1 <= r <= f for r, f in zip(choice.ranks, full, strict=True)):
        return f"ranks {list(choice.ranks)} are outside 1 to {list(full)}"
    return None
