"""Networks of a plan's shape whose weights mean nothing: to be timed, not used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from compress.calibrate.removal import group_widths
from compress.choose.choices import narrowed_site
from compress.linalg.geometry import Geometry
from compress.network.baseline import Network
from compress.network.chains import random_chain, replaced
from compress.network.narrowing import resized, widths_at
from compress.network.sites import LayerSite
from compress.plan import Choice, Plan
from compress.running.modules import replace_module


def sketched(dense: nn.Module, network: Network, choices: Iterable[Choice]) -> nn.Module:
    """A network of a plan's shape.

    Args:
        dense: The dense baseline in the dtype that it will run in; it is left as it was.
        network: What is known of it.
        choices: One for each layer.
    """
    plan = Plan("latency", None, "", tuple(choices))
    narrow = narrowed(dense, network, group_widths(plan, network.channels))
    modules = dict(narrow.named_modules(remove_duplicate=False))
    sites = {site.name: site for site in network.sites}
    chains = {
        c.name: random_chain(_geometry(sites, c), c.scheme, c.ranks, modules[c.name])
        for c in plan.choices
        if c.factored
    }
    return replaced(narrow, sites, chains)


def _geometry(sites: Mapping[str, LayerSite], choice: Choice) -> Geometry:
    site = sites[choice.name]
    return (site if choice.width is None else narrowed_site(site, choice.width)).geometry


def narrowed(dense: nn.Module, network: Network, groups: Mapping[str, int]) -> nn.Module:
    """A network with groups of channels of given widths, its weights those that are left over."""
    sites = {site.name: site for site in network.sites}
    new = replaced(dense, sites, {})
    for width in widths_at(dense, network.channels, groups):
        module, io = dense.get_submodule(width.name), (width.inputs, width.outputs)
        site = sites.get(width.name)
        biased = site is not None and narrowed_site(site, io).biased
        narrow = resized(module, *io, biased=biased)
        for alias in width.aliases:
            replace_module(new, alias, narrow)
    return new
