"""What a choice for one layer costs, where it stops saving, and how it is recorded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from compress.calibrate.problems import fit_problem, layer_problem
from compress.calibrate.statistics import Calibration
from compress.linalg.fit import Problem
from compress.linalg.schemes import Ranks, chain_macs, chain_params, scheme_named
from compress.network.sites import LayerSite
from compress.plan import DENSE, NARROWER, Choice
from compress.rules import Sized


@dataclass(frozen=True)
class SchemeCost:
    """MACs per image and parameters of one layer under a scheme at given ranks."""

    macs: int
    params: int


def scheme_cost(site: LayerSite, scheme: str, ranks: Ranks) -> SchemeCost:
    """Cost of a layer rewritten by a scheme; dense or narrow is the layer as it is."""
    if scheme in (DENSE, *NARROWER):
        return SchemeCost(site.macs, site.params)
    chain = scheme_named(scheme).stages(site.geometry, ranks)
    macs = site.count_macs(lambda call: chain_macs(chain, call.size))
    return SchemeCost(macs, chain_params(chain))


def break_even(site: LayerSite, scheme: str, size: Callable[[Sized], int]) -> int:
    """Largest rank at which a scheme of one rank still saves; 0 where none does."""
    dense = size(site)
    limits = scheme_named(scheme).full_ranks(site.geometry)
    low, high = 0, limits[0] + 1
    while high - low > 1:
        middle = (low + high) // 2
        ranks = (middle,) * len(limits)
        saves = size(scheme_cost(site, scheme, ranks)) < dense
        low, high = (middle, high) if saves else (low, middle)
    return low


def problems(
    model: nn.Module, calibration: Calibration, *, fitted: bool = False
) -> Callable[[LayerSite], Problem]:
    """Return what makes a layer's problem from its statistics.

    Args:
        model: The network, norms folded.
        calibration: Statistics.
        fitted: Whether in the metric that the fits use, or in that of the plain spectra.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    make = fit_problem if fitted else layer_problem
    return lambda site: make(site, modules[site.name], calibration.statistics[site.name])


def kept(site: LayerSite, reason: str) -> Choice:
    """The choice to leave a layer as it is, weights included."""
    return replace(make_choice(site, DENSE, (), reason, 0), locked=True)


def narrowed_site(site: LayerSite, width: tuple[int, int]) -> LayerSite:
    """A layer with fewer inputs and outputs.

    It has a bias, for what is missed on average; a depthwise layer only where it had one.
    """
    geometry = site.geometry
    groups = width[1] if geometry.groups > 1 else 1
    changed = geometry.with_(in_channels=width[0], out_channels=width[1], groups=groups)
    return replace(site, geometry=changed, biased=site.biased or groups == 1)


def make_choice(  # noqa: PLR0913 - what a record holds
    site: LayerSite,
    scheme: str,
    ranks: Ranks,
    reason: str,
    limit: int,
    width: tuple[int, int] | None = None,
) -> Choice:
    """Record a choice; ``limit`` is the break-even rank, ``width`` as `Choice`."""
    narrow = site if width is None else narrowed_site(site, width)
    cost = scheme_cost(narrow, scheme, ranks)
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
        full_rank=lossless_rank(site, scheme),
        width=width,
    )


def lossless_rank(site: LayerSite, scheme: str) -> int:
    """The first rank at which a scheme loses nothing; the weight matrix's for one without ranks."""
    if scheme in (DENSE, *NARROWER):
        return site.geometry.full_rank
    return scheme_named(scheme).full_ranks(site.geometry)[0]


def rounded_up(rank: int, multiple: int | None, full: int) -> int:
    """Round a rank up to a multiple, at most full."""
    return rank if multiple is None else min(full, math.ceil(rank / multiple) * multiple)
