"""Choosing the rank of one layer from the spectrum of its outputs, or by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compress.choose.choices import break_even, kept, make_choice, rounded_up, scheme_cost
from compress.choose.overrides import Overrides
from compress.linalg.schemes import OUTPUT, Ranks, scheme_for_ranks, scheme_named
from compress.network.sites import LayerSite
from compress.plan import DENSE, Choice
from compress.rules.record import RankOf

# Eigenvalues of a layer's outputs, one list a group.
Spectra = Callable[[LayerSite], list[list[float]]]


@dataclass(frozen=True)
class Asked:
    """What a rule by spectra asks for.

    Attributes:
        rank_of: The rank of one spectrum; None where only ranks by hand count.
        rule: The rule and its value in words.
    """

    rank_of: RankOf | None
    rule: str

    def rank(self, spectra: list[list[float]]) -> tuple[int, int]:
        """Return the largest rank that a group calls for, and of how many it is.

        Raises:
            ValueError: The rule gives no ranks.
        """
        if self.rank_of is None:
            raise ValueError("ranks given by hand call for no spectrum")
        return max(map(self.rank_of, spectra)), len(spectra[0])


def choose_by_spectrum(
    site: LayerSite, overrides: Overrides, spectra: Spectra, asked: Asked
) -> Choice:
    """Choose the rank of one layer by its own spectrum, or by hand.

    Args:
        site: The layer.
        overrides: What the user fixed.
        spectra: Eigenvalues of a layer's outputs, one list a group.
        asked: The rule.
    """
    reason = overrides.kept(site)
    if reason is not None:
        return kept(site, reason)
    ranks = overrides.ranks(site)
    scheme = overrides.scheme(site) or (scheme_for_ranks(ranks) if ranks else OUTPUT).name
    reason = None if ranks else _beyond_the_rule(scheme, overrides, asked)
    if reason is not None:
        return kept(site, reason)
    why_not = scheme_named(scheme).unavailable(site.geometry)
    if why_not is not None:
        return kept(site, f"{scheme}: {why_not}")
    full = scheme_named(scheme).full_ranks(site.geometry)
    if ranks is not None:
        ranks = tuple(min(r, limit) for r, limit in zip(ranks, full, strict=True))
        forced = overrides.config.force_rank
        why = f"rank {','.join(map(str, ranks))} given"
        return _unless_it_costs(site, scheme, ranks, why, forced=forced)
    rank, count = asked.rank(spectra(site))
    ranks = (rounded_up(rank, overrides.config.round_to, full[0]),)
    return _unless_it_costs(site, scheme, ranks, f"{asked.rule} keeps {rank} of {count}")


def _beyond_the_rule(scheme: str, overrides: Overrides, asked: Asked) -> str | None:
    """Why a rule by spectra has no rank for a layer without one by hand; None where it has."""
    if asked.rank_of is None:
        return "no rank given"
    if scheme != OUTPUT.name or scheme not in overrides.config.ways:
        name = asked.rule.partition(" ")[0]
        return f"the {name} rule chooses ranks only for the output scheme"
    return None


def _unless_it_costs(
    site: LayerSite, scheme: str, ranks: Ranks, why: str, *, forced: bool = False
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
