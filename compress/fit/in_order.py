"""Refitting layers in execution order to what the compressed network really feeds them.

After the rewrite every layer's input differs from what its factors were fitted on. Walking both
networks side by side, each layer is fitted again by ridge regression of the *original* network's
output on the *compressed* network's input (asymmetric reconstruction: Zhang, Zou, He & Sun,
"Accelerating Very Deep Convolutional Networks for Classification and Detection", 2015). Beyond
that paper, where a layer's output is added to a shortcut the target is what the *sum* lacks, and
all factors are refitted, not only the last. Layers that were kept stay as they are, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from compress.fit.factors import LEAST_GAIN, Factors
from compress.fit.lockstep import Frontier, Pair, residual_partner, spill_folder
from compress.fit.walk import RefitImages, RefitSettings, Traced, Walk
from compress.layers import registered_kind
from compress.linalg.fit import Covariances, Problem, refine
from compress.linalg.geometry import output_rows, patch_rows
from compress.linalg.moments import Moments
from compress.linalg.problem import solve_psd
from compress.linalg.schemes import scheme_named, too_long
from compress.linalg.spectrum import regularise, square_roots
from compress.network.sites import LayerSite
from compress.progress import Track, silent
from compress.running.forward import evaluation_mode

# Ridge strengths tried, in units of the mean eigenvalue of the patches' covariance.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
ROWS = 1 << 16


@dataclass(frozen=True)
class Refit:
    """What became of one layer: held-out weighted error per row, before and after."""

    before: float
    after: float


class _Regression:
    """Moments of rows ``[patch, target]`` of one layer."""

    def __init__(self, site: LayerSite, device: torch.device) -> None:
        g = site.geometry
        self.d = g.in_features
        self.moments = Moments(g.groups, g.in_features + g.out_features, device)

    def add(self, patches: Tensor, targets: Tensor) -> None:
        self.moments.update(torch.cat([patches, targets], dim=2))

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariances of patches, of targets with patches, of targets, once all rows are added."""
        covariance, d = self.moments.covariance, self.d
        return covariance[:, :d, :d], covariance[:, d:, :d], covariance[:, d:, d:]

    def error(self, weighting: Tensor, matrix: Tensor, bias: Tensor) -> float:
        """``E[(t - Ŵx - b)ᵀ G (t - Ŵx - b)]`` with bias ``[groups, out]``."""
        xx, tx, tt = self.parts
        gram = tt - matrix @ tx.mT - tx @ matrix.mT + matrix @ xx @ matrix.mT
        rest = self.bias(matrix) - bias
        gram = gram + rest.unsqueeze(2) * rest.unsqueeze(1)
        return float((weighting * gram).sum())

    def bias(self, matrix: Tensor) -> Tensor:
        """The bias that makes the mean exact, ``[groups, out]``."""
        mean = self.moments.mean
        return mean[:, self.d :] - (matrix @ mean[:, : self.d].unsqueeze(2)).squeeze(2)


def refit(
    traced: Traced,
    factors: Mapping[str, Factors],
    images: RefitImages,
    settings: RefitSettings = RefitSettings(),
    track: Track = silent,
) -> tuple[dict[str, Factors], dict[str, Refit]]:
    """Refit the replaced layers of a model in execution order.

    Args:
        traced: The dense network.
        factors: The replaced layers, by name.
        images: What to fit on, and what decides whether a refit stays.
        settings: Iterations, cache and seed.
        track: Progress.

    Returns:
        The factors, new where they got better on the validation images, and what each layer's
        error became.
    """
    sites = traced.sites
    # Long patches would take minutes a layer, and gigabytes; the joint refit has them too.
    once = [n for n in factors if len(sites[n].calls) == 1 and not too_long(sites[n].geometry)]
    by_alias = {a: n for n in once for a in sites[n].aliases}
    steps = [n for n in traced.graph.nodes if n.op == "call_module" and str(n.target) in by_alias]
    current = dict(factors)
    outcome: dict[str, Refit] = {}
    with torch.no_grad(), evaluation_mode(traced.model), spill_folder() as folder:
        walk = _InOrder(traced, Frontier(settings.cache_bytes, folder))
        for name, found in factors.items():
            walk.install(sites[name], found)
        walk.start(images)
        for node in track(steps, "refit", len(steps)):
            name = by_alias[str(node.target)]
            rows = walk.advance(node, sites[name], settings.seed)
            layer = _Layer(sites[name], walk.lockstep.modules[name], factors[name])
            found, outcome[name] = layer.solve(rows, settings.iterations)
            if found is not factors[name]:
                current[name] = found
                walk.install(sites[name], found)
    return current, outcome


@dataclass(frozen=True)
class _Rows:
    """What a layer sees on the images to fit on, and on those that decide."""

    train: _Regression
    held_out: _Regression


class _InOrder(Walk):
    """The walk that stops at one layer after the other."""

    def advance(self, node: fx.Node, site: LayerSite, seed: int) -> _Rows:
        """Bring all batches to a node; return what its layer sees."""
        nodes = self.lockstep.nodes
        index = nodes.index(node)
        segment = nodes[self.position + 1 : index]
        partner = residual_partner(node, set(nodes[:index]), self.lockstep.modules)
        found = _Rows(_Regression(site, self.device), _Regression(site, self.device))
        for batch, held_out in enumerate(self.held_out):
            environment = self.frontier.take(batch)
            self.lockstep.run(environment, segment)
            given, target = self._target(node, environment, partner, site)
            positions = _sample(target, len(self.held_out), seed + batch)
            patches = patch_rows(given, site.geometry, positions)
            targets = output_rows(target, site.geometry, positions)
            (found.held_out if held_out else found.train).add(patches, targets)
            self.frontier.put(batch, environment)
        self.position = index - 1
        return found

    def _target(
        self,
        node: fx.Node,
        environment: dict[str, Pair],
        partner: fx.Node | None,
        site: LayerSite,
    ) -> tuple[Tensor, Tensor]:
        """A layer's input in the compressed network, and what the original output asks of it."""
        module = self.lockstep.modules[site.name]
        kind = registered_kind(module)
        pair = environment[node.all_input_nodes[0].name]
        target = kind.images(module(pair.dense))
        if partner is not None and not environment[partner.name].same:
            other = environment[partner.name]
            target = target + kind.images(other.dense - other.compressed)
        return kind.images(pair.compressed), target


def _sample(target: Tensor, batches: int, seed: int) -> Tensor | None:
    """Positions ``[batch, samples]``, one in each equal stretch; None for all of them."""
    places = math.prod(target.shape[2:])
    wanted = max(1, ROWS // (batches * target.shape[0]))
    if places <= wanted:
        return None
    generator = torch.Generator().manual_seed(seed)
    jitter = torch.rand(target.shape[0], wanted, generator=generator)
    stretch = places / wanted
    return (
        ((torch.arange(wanted) + jitter) * stretch).long().clamp_(max=places - 1).to(target.device)
    )


@dataclass(frozen=True)
class _Layer:
    """One replaced layer with the factors that it has before the refit."""

    site: LayerSite
    module: nn.Module
    old: Factors

    def solve(self, rows: _Rows, iterations: int) -> tuple[Factors, Refit]:
        """Fit the layer anew; the old factors stay unless the held-out error falls.

        The ridge pulls towards the original weight, not towards zero, and its strength is chosen on
        the held-out rows with only the last factor; then all factors are refitted at that strength.
        """
        old = self.old
        groups, out = self.site.geometry.groups, self.site.geometry.out_features
        bias = old.bias.double().view(groups, out)
        before = rows.held_out.error(old.weighting, old.fit.matrix, bias)
        best, least = old, before * (1 - LEAST_GAIN)
        attempt = self._attempts(rows)
        trials = {ridge: attempt(ridge, 0) for ridge in RIDGES}
        ridge = min(trials, key=lambda r: trials[r][0])
        alternates = iterations and not scheme_named(old.fit.scheme).closed_form
        for error, found in (
            trials[ridge],
            attempt(ridge, iterations) if alternates else trials[ridge],
        ):
            if error < least:
                best, least = found, error
        return best, Refit(before, before if best is old else least)

    def _attempts(self, rows: _Rows) -> Callable[[float, int], tuple[float, Factors]]:
        """Return what fits the layer at a ridge's strength, with rounds of alternation."""
        old, weight = self.old, registered_kind(self.module).weight(self.module)
        shape, weight = weight.shape, weight.double().flatten(2)
        xx, tx, _ = rows.train.parts
        scale = xx.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(1e-300)
        missing = tx - weight @ xx
        roots = square_roots(regularise(old.weighting))

        def attempt(ridge: float, rounds: int) -> tuple[float, Factors]:
            padded = xx.clone()
            padded.diagonal(dim1=-2, dim2=-1).add_(ridge * scale)
            wanted = weight + solve_psd(padded, missing)
            covariances = Covariances(wanted @ padded @ wanted.mT, padded)
            problem = Problem(
                self.site.geometry, wanted.reshape(shape), covariances, old.weighting, roots
            )
            found = refine(problem, old.fit, rounds)
            bias = rows.train.bias(found.matrix)
            error = rows.held_out.error(old.weighting, found.matrix, bias)
            return error, Factors(found, bias.flatten(), old.weighting)

        return attempt
