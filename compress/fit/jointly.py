"""Refitting all factors of a stretch of the network together, for its output.

The refit in execution order (`compress.fit.in_order`) is linear: it fits each layer's output before
the activation, as if what follows could not tell apart errors that a ReLU will cut off, and one
layer does not know what a later one of the same block could mend. Here the graph is cut where a
single tensor carries everything on, and all weights in a stretch of a few blocks are improved
jointly, by falling steps (`compress.linalg.steps`) on ``Σ_p Δ_pᵀ G Δ_p`` with ``Δ`` the error of
the compressed network where the stretch ends and ``G`` the Fisher weighting there (block
reconstruction: Li et al., "BRECQ", 2021; activation-aware targets: Zhang et al. 2015). Layers that
the rule left dense take part, which costs nothing; those that must stay as they are do not. A
stretch keeps its new weights where held-out images agree.

The error of every position at a cut teaches more than that of the logits: refitting the whole
network, or blocks through the dense rest of it, for the logits came out worse on other images.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from compress.calibrate.problems import bias_of
from compress.fit.cuts import find_segments, join
from compress.fit.factors import LEAST_GAIN, Factors, whole
from compress.fit.frontier import Frontier, spill_folder
from compress.fit.stretches import Stretch, StretchWalk, pieces
from compress.fit.walk import RefitImages, RefitSettings, Traced
from compress.layers import registered_kind
from compress.linalg.fit import with_weights
from compress.network.sites import LayerSite
from compress.plan import NARROW
from compress.progress import Track, silent
from compress.running.forward import evaluation_mode, frozen

# Blocks that are refitted as one: fewer see less of what follows, more fit the images by heart.
BLOCKS = 4

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Improved:
    """What the joint refit came to.

    Attributes:
        factors: Of the replaced layers, new where the held-out error of their stretch fell.
        kept: New weights, by parameter name, of the dense layers in such stretches.
        further: How many images it learned from beside those fitted to.
    """

    factors: dict[str, Factors]
    kept: dict[str, Weights]
    further: int = 0


@dataclass(frozen=True)
class Movable:
    """What the joint refit may change.

    Attributes:
        factors: Those of the replaced layers, by name.
        free: Names of dense layers whose weights may change too.
    """

    factors: Mapping[str, Factors]
    free: Collection[str] = ()


def refit_jointly(
    traced: Traced,
    movable: Movable,
    images: RefitImages,
    settings: RefitSettings = RefitSettings(),
    track: Track = silent,
) -> Improved:
    """Improve weights jointly, stretch by stretch, in execution order.

    Args:
        traced: The dense network.
        movable: What may change.
        images: What to fit on, and what decides whether new factors stay.
        settings: Weighting, loss, cache and seed.
        track: Progress.
    """
    sites, factors = traced.sites, movable.factors
    once = [n for n in (*factors, *movable.free) if len(sites[n].calls) == 1]
    names = {alias: n for n in once for alias in sites[n].aliases}
    current = Improved(dict(factors), {})
    with evaluation_mode(traced.model), frozen(traced.model), spill_folder() as folder:
        walk = StretchWalk(traced, Frontier(settings.cache_bytes, folder))
        for name, found in factors.items():
            walk.install(sites[name], found)
        if not images.whole:
            fit, validation = pieces(images.fit), pieces(images.validation)
            images = RefitImages(fit, validation, pieces(images.further))
        walk.start(images)
        values = walk.values(whole=images.whole)
        positions = [value.positions for value in values]
        cuts = find_segments(traced.graph, traced.model, names, positions)
        ends = {
            s: values[s.end].behind_layers([sites[n].kind for n in s.layers])
            for s in join(cuts, BLOCKS, positions)
        }
        segments = {segment: end for segment, end in ends.items() if end.axis is not None}
        for name in (n for segment in segments for n in segment.layers if n not in factors):
            walk.free(sites[name])
        metrics = walk.metrics(segments, settings) if settings.weigh and segments else {}
        added = walk.add_further(images.further, segments, values)
        current = replace(current, further=added)
        for segment in track(segments, "refit jointly", len(segments)):
            walk.advance(segment)
            end = segments[segment]
            by_image = values[segment.start].by_image and end.by_image
            stretch = Stretch(walk, segment, metrics.get(segment.end), end, by_image)
            better = _improve(stretch, current.factors, settings.seed)
            current.factors.update(better.factors)
            current.kept.update(better.kept)
            walk.finish(segment)
    return current


def _improve(stretch: Stretch, factors: Mapping[str, Factors], seed: int) -> Improved:
    """Train the weights of a stretch; return the new ones, none where they are no better."""
    walk, names = stretch.walk, stretch.segment.layers
    old = {name: copy.deepcopy(walk.layers[name].state_dict()) for name in names}
    before = stretch.error()
    if before > 0:
        stretch.train(before, seed)
    better = stretch.error() < before * (1 - LEAST_GAIN)
    found = Improved({}, {})
    for name in names:
        site = walk.traced.sites[name]
        if not better:
            walk.layers[name].load_state_dict(old[name])
        elif name in factors:
            found.factors[name] = _read(walk.layers[name], factors[name], site)
            walk.install(site, found.factors[name])  # balanced anew
        else:
            found.kept[name] = walk.layers[name].state_dict()
    return found


def _read(chain: nn.Module, old: Factors, site: LayerSite) -> Factors:
    """The factors that a trained chain holds, balanced."""
    layers = list(chain.children()) or [chain]
    weights = tuple(registered_kind(x).weight(x).detach().double() for x in layers)
    if old.fit.scheme == NARROW:
        return replace(old, fit=whole(weights[0].clone()), bias=bias_of(layers[-1]).clone())
    bias = bias_of(layers[-1])
    return replace(old, fit=with_weights(site.geometry, old.fit, weights), bias=bias)
