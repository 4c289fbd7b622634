"""The rules: from a configuration to a plan."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from compress.calibrate.statistics import Calibration
from compress.choose.budgets import BUDGET_RULES, Budgets
from compress.choose.choices import break_even, kept, make_choice, problems, rounded_up, scheme_cost
from compress.choose.overrides import Overrides
from compress.choose.spectrum import rank_by_energy, rank_by_threshold
from compress.config import RunConfig
from compress.errors import ConfigError
from compress.linalg.fit import Problem
from compress.linalg.schemes import OUTPUT, Ranks, scheme_for_ranks, scheme_named
from compress.network.sites import LayerSite
from compress.plan import DENSE, Choice, Plan
from compress.progress import Track, silent


def make_plan(
    model: nn.Module,
    sites: tuple[LayerSite, ...],
    calibration: Calibration,
    config: RunConfig,
    track: Track = silent,
) -> Plan:
    """Choose for every layer by the configuration's rule.

    Args:
        model: The network, norms folded.
        sites: Its layers.
        calibration: Their statistics.
        config: Rule, overrides, schemes.
        track: Progress.

    Raises:
        BudgetError: The budget cannot be reached; the smallest reachable fraction is named.
        ConfigError: Overrides that fit no layer.
    """
    if config.rule in ("threshold", "energy", "rank"):
        overrides, problem = Overrides(config, sites), problems(model, calibration)
        tracked = track(sites, "plan", len(sites))
        choices = [_by_spectrum(site, overrides, config, problem) for site in tracked]
    elif config.rule in BUDGET_RULES:
        choices = Budgets(model, sites, calibration, config, track).spend(config.rule_value or 0.0)
    else:
        raise ConfigError(f"the {config.rule} rule needs the validation images, not a plan alone")
    return Plan(config.rule, config.rule_value, config.metric, tuple(choices))


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
    scheme = overrides.scheme(site) or (scheme_for_ranks(asked) if asked else OUTPUT).name
    if asked is None and config.rule == "rank":
        return kept(site, "no rank given")
    if asked is None and (scheme != OUTPUT.name or scheme not in config.schemes):
        return kept(site, f"the {config.rule} rule chooses ranks for the output scheme alone")
    why_not = scheme_named(scheme).unavailable(site.geometry)
    if why_not is not None:
        return kept(site, f"{scheme}: {why_not}")
    full = scheme_named(scheme).full_ranks(site.geometry)
    if asked is None:
        spectra = [s.tolist() for s in problem(site).plain_spectrum]
        by_rule = rank_by_threshold if config.rule == "threshold" else rank_by_energy
        value = config.rule_value or 0.0
        rank = max(by_rule(s, value) for s in spectra)
        asked = (rounded_up(rank, config.round_to, full[0]),)
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
        return make_choice(site, scheme, ranks, why, limit)
    beyond = f"{why}, beyond break-even ({limit})"
    if forced:
        return make_choice(site, scheme, ranks, beyond + ", forced", limit)
    return make_choice(site, DENSE, (), beyond + ": rewriting would save nothing", limit)
