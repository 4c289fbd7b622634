"""Refitting layers in execution order to what the compressed network really feeds them.

After the rewrite every layer's input differs from what its factors were fitted on. Walking both
networks side by side, each layer is fitted again by ridge regression of the *original* network's
output on the *compressed* network's input (asymmetric reconstruction: Zhang, Zou, He & Sun,
"Accelerating Very Deep Convolutional Networks for Classification and Detection", 2015). Beyond
that paper, where a layer's output is added to a shortcut the target is what the *sum* lacks, and
all factors are refitted, not the last alone. Layers that were kept stay as they are, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from compress.fit.lockstep import Frontier, Lockstep, Pair, residual_partner, spill_folder
from compress.layers import kind_of
from compress.linalg.fit import Covariances, Fit, Problem, refine
from compress.linalg.geometry import output_rows, patch_rows
from compress.linalg.moments import Moments
from compress.linalg.problem import solve_psd
from compress.linalg.schemes import scheme_named
from compress.linalg.spectrum import regularise, square_roots
from compress.network.chains import Chain, build_chain
from compress.network.sites import LayerSite
from compress.progress import Track, silent
from compress.running.forward import evaluation_mode

# Ridge strengths tried, in units of the mean eigenvalue of the patches' covariance.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# A refit is kept where it lowers the held-out error by this much at least.
LEAST_GAIN = 1e-3
ROWS = 1 << 16


@dataclass(frozen=True)
class Refit:
    """What became of one layer: held-out weighted error per row, before and after."""

    before: float
    after: float


@dataclass(frozen=True)
class Factors:
    """One replaced layer as it stands.

    Attributes:
        fit: Its factors.
        bias: ``[c_out]``.
        weighting: ``G [groups, out, out]``, regularised.
    """

    fit: Fit
    bias: Tensor
    weighting: Tensor

    @property
    def chain(self) -> Chain:
        """What to build."""
        return Chain(self.fit.scheme, self.fit.ranks, self.fit.weights, self.bias)


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
    model: nn.Module,
    graph: fx.Graph,
    sites: Mapping[str, LayerSite],
    factors: Mapping[str, Factors],
    fit_batches: Iterable[Tensor],
    validation_batches: Iterable[Tensor],
    *,
    cache_bytes: int = 1 << 30,
    iterations: int = 6,
    seed: int = 0,
    track: Track = silent,
) -> tuple[dict[str, Factors], dict[str, Refit]]:
    """Refit the replaced layers of a model in execution order.

    Args:
        model: The dense network.
        graph: Its graph.
        sites: Its layers.
        factors: The replaced ones, by name.
        fit_batches: Images to fit on.
        validation_batches: Images that decide whether a refit stays.
        cache_bytes: Memory for activations at the frontier; what exceeds it goes to disk.
        iterations: Rounds of alternation for the factors before the last.
        seed: Of the sampled positions.
        track: Progress.

    Returns:
        The factors, new where they got better on the validation images, and what each layer's
        error became.
    """
    by_alias = {a: n for n in factors for a in sites[n].aliases if len(sites[n].calls) == 1}
    steps = [n for n in graph.nodes if n.op == "call_module" and str(n.target) in by_alias]
    current = dict(factors)
    outcome: dict[str, Refit] = {}
    with torch.no_grad(), evaluation_mode(model), spill_folder() as folder:
        walk = _Walk(model, graph, sites, factors, Frontier(cache_bytes, folder), seed)
        walk.start(fit_batches, validation_batches)
        for node in track(steps, "refit", len(steps)):
            name = by_alias[str(node.target)]
            train, held_out = walk.advance(node, sites[name])
            module = walk.lockstep.modules[name]
            found, outcome[name] = solve(
                sites[name], module, factors[name], train, held_out, iterations
            )
            if found is not factors[name]:
                current[name] = found
                walk.install(sites[name], found)
    return current, outcome


class _Walk:
    """The walk of all batches through the graph, stopping at layers."""

    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph,
        sites: Mapping[str, LayerSite],
        factors: Mapping[str, Factors],
        frontier: Frontier,
        seed: int,
    ) -> None:
        self.lockstep = Lockstep(model, graph, {})
        self.frontier, self.seed = frontier, seed
        self.held_out: list[bool] = []
        self.position = 1
        for name, found in factors.items():
            self.install(sites[name], found)

    def install(self, site: LayerSite, found: Factors) -> None:
        """Put factors in a layer's place from here on."""
        built = build_chain(site.geometry, found.chain, self.lockstep.modules[site.name])
        for alias in site.aliases:
            self.lockstep.chains[alias] = built

    def start(self, fit: Iterable[Tensor], validation: Iterable[Tensor]) -> None:
        """Put every batch at the first node."""
        first = self.lockstep.nodes[0].name
        for batches, held_out in ((fit, False), (validation, True)):
            for images in batches:
                self.frontier.put(len(self.held_out), {first: Pair(images, images)})
                self.held_out.append(held_out)

    def advance(self, node: fx.Node, site: LayerSite) -> tuple[_Regression, _Regression]:
        """Bring all batches to a node; return what its layer sees on fit and held-out images."""
        nodes = self.lockstep.nodes
        index = nodes.index(node)
        segment = nodes[self.position : index]
        partner = residual_partner(node, set(nodes[:index]), self.lockstep.modules)
        module = self.lockstep.modules[site.name]
        device = next(module.parameters()).device
        found = _Regression(site, device), _Regression(site, device)
        for batch, held_out in enumerate(self.held_out):
            environment = self.frontier.take(batch)
            self.lockstep.run(environment, segment)
            patches, targets = self._rows(node, environment, partner, site, self.seed + batch)
            found[held_out].add(patches, targets)
            self.frontier.put(batch, environment)
        self.position = index
        return found

    def _rows(
        self,
        node: fx.Node,
        environment: dict[str, Pair],
        partner: fx.Node | None,
        site: LayerSite,
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        """The compressed input's patches, and what the original output asks of them."""
        module = self.lockstep.modules[site.name]
        kind, source = kind_of(module), node.args[0]
        assert kind is not None
        assert isinstance(source, fx.Node)
        pair = environment[source.name]
        target = kind.images(module(pair.dense))
        if partner is not None and not environment[partner.name].same:
            other = environment[partner.name]
            target = target + kind.images(other.dense - other.compressed)
        positions = _sample(target, len(self.held_out), seed)
        patches = patch_rows(kind.images(pair.compressed), site.geometry, positions)
        return patches, output_rows(target, site.geometry, positions)


def _sample(target: Tensor, batches: int, seed: int) -> Tensor | None:
    """Positions ``[batch, samples]``, one in each equal stretch; None for all of them."""
    places = target.shape[2] * target.shape[3]
    wanted = max(1, ROWS // (batches * target.shape[0]))
    if places <= wanted:
        return None
    generator = torch.Generator().manual_seed(seed)
    jitter = torch.rand(target.shape[0], wanted, generator=generator)
    stretch = places / wanted
    return (
        ((torch.arange(wanted) + jitter) * stretch).long().clamp_(max=places - 1).to(target.device)
    )


def solve(
    site: LayerSite,
    module: nn.Module,
    old: Factors,
    train: _Regression,
    held_out: _Regression,
    iterations: int,
) -> tuple[Factors, Refit]:
    """Fit one layer anew on the fit rows; the old factors stay unless the held-out error falls.

    The ridge pulls towards the original weight, not towards zero, and its strength is chosen on
    the held-out rows with the last factor alone; then all factors are refitted at that strength.
    """
    kind = kind_of(module)
    assert kind is not None
    groups, out = site.geometry.groups, site.geometry.out_features
    before = held_out.error(old.weighting, old.fit.matrix, old.bias.double().view(groups, out))
    best, least = old, before * (1 - LEAST_GAIN)
    shape = kind.weight(module).shape
    weight = kind.weight(module).double().flatten(2)
    xx, tx, _ = train.parts
    scale = xx.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(1e-300)
    missing = tx - weight @ xx
    roots = square_roots(regularise(old.weighting))

    def attempt(ridge: float, rounds: int) -> tuple[float, Factors]:
        padded = xx.clone()
        padded.diagonal(dim1=-2, dim2=-1).add_(ridge * scale)
        wanted = weight + solve_psd(padded, missing)
        outputs = wanted @ padded @ wanted.mT
        problem = Problem(
            site.geometry, wanted.reshape(shape), Covariances(outputs, padded), old.weighting, roots
        )
        found = refine(problem, old.fit, rounds)
        bias = train.bias(found.matrix)
        error = held_out.error(old.weighting, found.matrix, bias)
        return error, Factors(found, bias.flatten(), old.weighting)

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
