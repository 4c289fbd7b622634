"""What layers cost at widths of their inputs and outputs: counted, or as a device takes time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from compress.choose.choices import SchemeCost, narrowed_site
from compress.linalg.schemes import scheme_named
from compress.network.channels import ChannelGroup
from compress.network.sites import LayerSite
from compress.plan import DENSE, Candidate
from compress.rules import Currency

Floats = NDArray[np.float64]
# Inputs and outputs.
Width = tuple[int, int]
# From parts of a layer's inputs and outputs, ``[n]``, to its candidates' costs ``[n, candidates]``.
AtParts = Callable[[Floats, Floats], Floats]


class Costs(Protocol):
    """What layers cost that become narrower; a layer of all its width costs what it has always."""

    @property
    def currency(self) -> Currency:
        """What is counted in."""
        ...

    def at_parts(self, site: LayerSite, candidates: Sequence[Candidate]) -> AtParts:
        """What a layer's candidates cost at parts of its inputs and outputs."""
        ...

    def dense(self, site: LayerSite, width: Width | None) -> float:
        """What a layer costs at a width, or as wide as it is, where it is not rewritten."""
        ...

    def narrowed(self, site: LayerSite, width: Width) -> Callable[[Candidate], Candidate | None]:
        """What gives a candidate its cost at a width; None where it is no use there."""
        ...

    def others(self, group: ChannelGroup, widths: Sequence[int]) -> Floats:
        """What all else costs that the width of a group of channels changes, by width."""
        ...


@dataclass(frozen=True)
class Counted:
    """MACs or parameters.

    Attributes:
        currency: Which of them.
    """

    currency: Currency

    def at_parts(self, site: LayerSite, candidates: Sequence[Candidate]) -> AtParts:
        """See `Costs`. That is ``both i o + inputs i + inside + outputs o``, exactly."""
        size = self.currency.size
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
        both, inputs, inside, outputs = columns

        def cost(i: Floats, o: Floats) -> Floats:
            i, o = i[:, None], o[:, None]
            return np.asarray(both * i * o + inputs * i + inside + outputs * o)

        return cost

    def dense(self, site: LayerSite, width: Width | None) -> float:
        """See `Costs`."""
        return float(self.currency.size(site if width is None else narrowed_site(site, width)))

    def narrowed(self, site: LayerSite, width: Width) -> Callable[[Candidate], Candidate | None]:
        """See `Costs`."""
        return counted(narrowed_site(site, width))

    def others(self, group: ChannelGroup, widths: Sequence[int]) -> Floats:
        """Nothing."""
        del group
        return np.zeros(len(widths))


def counted(site: LayerSite) -> Callable[[Candidate], Candidate | None]:
    """Return what gives a candidate the cost that it has for a layer; None where it is no use."""
    # Of a layer with a single output left, for one, nothing can be factored.
    able = site.schemes

    def costed(candidate: Candidate) -> Candidate | None:
        if candidate.scheme == DENSE:
            return replace(candidate, macs=site.macs, params=site.params)
        if candidate.scheme not in able:
            return None
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
