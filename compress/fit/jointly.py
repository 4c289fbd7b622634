"""Refitting all factors of a stretch of the network together, for its output.

The refit in execution order (`compress.fit.in_order`) is linear: it fits each layer's output before
the activation, as if what follows could not tell apart errors that a ReLU will cut off, and one
layer does not know what a later one of the same block could mend. Here the graph is cut where a
single tensor carries everything on, and all weights in a stretch of a few blocks are improved
jointly, by a short run of Adam on ``Σ_p Δ_pᵀ G Δ_p`` with ``Δ`` the error of the compressed network
where the stretch ends and ``G`` the Fisher weighting there (block reconstruction: Li et al.,
"BRECQ", 2021; activation-aware targets: Zhang et al. 2015). Layers that the rule left dense take
part, which costs nothing; those that must stay as they are do not. A stretch keeps its new weights
where held-out images agree.

The error of every position at a cut teaches more than that of the logits: refitting the whole
network, or blocks through the dense rest of it, for the logits came out worse on other images.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from compress.calibrate.fisher import LossFunction, Objective
from compress.fit.cuts import Segment, find_segments, join
from compress.fit.in_order import LEAST_GAIN, Factors
from compress.fit.lockstep import Frontier, Lockstep, Pair, spill_folder
from compress.layers import kind_of
from compress.linalg.fit import with_weights
from compress.linalg.moments import Moments
from compress.linalg.spectrum import regularise, square_roots
from compress.network.chains import build_chain
from compress.network.sites import LayerSite
from compress.progress import Track, silent
from compress.running.forward import evaluation_mode, frozen

EPOCHS = 12
# Images a step, whatever the batches are: results must not depend on what fits into memory.
STEP_IMAGES = 32
# Blocks that are refitted as one: fewer see less of what follows, more fit the images by heart.
BLOCKS = 4
# Steps are this part of each weight's root mean square: factors are balanced, layers differ.
STEP = 0.01
LARGEST_GRADIENT = 10.0

Labelled = Iterable[tuple[Tensor, Tensor]]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Improved:
    """What the joint refit came to.

    Attributes:
        factors: Of the replaced layers, new where the held-out error of their stretch fell.
        kept: New weights, by parameter name, of the dense layers in such stretches.
    """

    factors: dict[str, Factors]
    kept: dict[str, Weights]


def refit_segments(
    model: nn.Module,
    graph: fx.Graph,
    sites: Mapping[str, LayerSite],
    factors: Mapping[str, Factors],
    fit_batches: Labelled,
    validation_batches: Labelled,
    *,
    free: Collection[str] = (),
    weigh: bool = True,
    loss: LossFunction | None = None,
    cache_bytes: int = 1 << 30,
    seed: int = 0,
    track: Track = silent,
) -> Improved:
    """Improve weights jointly, stretch by stretch, in execution order.

    Args:
        model: The dense network.
        graph: Its graph.
        sites: Its layers.
        factors: The replaced ones, by name.
        fit_batches: Images (and labels, which only ``loss`` looks at) to fit on.
        validation_batches: Images that decide whether new factors stay.
        free: Names of dense layers whose weights may change too.
        weigh: Whether errors are weighted by the loss; else all outputs count alike.
        loss: The user's own, as `compress.calibrate.fisher.Objective` takes it.
        cache_bytes: Memory for activations; what exceeds it goes to disk.
        seed: Of the order of batches and the random signs.
        track: Progress.
    """
    movable = [n for n in (*factors, *free) if len(sites[n].calls) == 1]
    names = {alias: n for n in movable for alias in sites[n].aliases}
    *_, last, output = graph.nodes
    current = Improved(dict(factors), {})
    if output.args != (last,):
        return current
    with evaluation_mode(model), frozen(model), spill_folder() as folder:
        walk = _Walk(model, graph, Frontier(cache_bytes, folder))
        for name, found in factors.items():
            walk.install(sites[name], found)
        walk.start(fit_batches, validation_batches)
        positions = walk.positions()
        segments = join(find_segments(graph, model, names, positions), BLOCKS, positions)
        for name in (n for segment in segments for n in segment.layers if n not in factors):
            walk.free(sites[name])
        metrics = walk.metrics(segments, loss, seed) if weigh and segments else {}
        for segment in track(segments, "refit jointly", len(segments)):
            shape = walk.advance(segment)
            if _suits(shape, [sites[n] for n in segment.layers]):
                root = metrics.get(segment.end, torch.eye(shape[1])).to(walk.device)
                better = walk.improve(segment, current.factors, sites, root, seed)
                current.factors.update(better.factors)
                current.kept.update(better.kept)
            walk.finish(segment)
    return current


def _suits(shape: torch.Size, layers: list[LayerSite]) -> bool:
    """Whether axis 1 of a stretch's output is sure to be its channels."""
    return len(shape) == 2 or (len(shape) == 4 and all(s.kind == "Conv2d" for s in layers))


def _pieces(batches: Labelled) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut batches anew, into the largest equal parts of a step that are no larger than the first.

    Only the last piece may be smaller.
    """
    size, images, labels = 0, torch.empty(0), torch.empty(0)
    for more, more_labels in batches:
        if not size:
            size = 1 << (min(len(more), STEP_IMAGES).bit_length() - 1)
            images, labels = more, more_labels
        else:
            images, labels = torch.cat([images, more]), torch.cat([labels, more_labels])
        while len(images) >= size:
            yield images[:size], labels[:size]
            images, labels = images[size:], labels[size:]
    if len(images):
        yield images, labels


def _channel_rows(value: Tensor) -> Tensor:
    """``[batch, channels, ...]`` as ``[rows, channels]``."""
    return value.flatten(2).transpose(1, 2).flatten(0, 1) if value.dim() > 2 else value


class _Walk:
    """Both networks, and all batches at one cut of the graph."""

    def __init__(self, model: nn.Module, graph: fx.Graph, frontier: Frontier) -> None:
        self.dense, self.compressed = Lockstep(model, graph, {}), Lockstep(model, graph, {})
        self.nodes, self.frontier = self.dense.nodes, frontier
        self.device = next(model.parameters()).device
        self.layers: dict[str, nn.Module] = {}
        self.held_out: list[bool] = []
        self.labels: list[Tensor] = []
        self.position = 0

    def install(self, site: LayerSite, found: Factors) -> None:
        """Put factors in a layer's place."""
        built = build_chain(site.geometry, found.chain, self.dense.modules[site.name])
        self._place(site, built)

    def free(self, site: LayerSite) -> None:
        """Let a dense layer differ between the networks."""
        self._place(site, copy.deepcopy(self.dense.modules[site.name]))

    def _place(self, site: LayerSite, module: nn.Module) -> None:
        self.layers[site.name] = module.requires_grad_(False)
        for alias in site.aliases:
            self.compressed.modules[alias] = module

    def start(self, fit: Labelled, validation: Labelled) -> None:
        """Put every batch at the first node."""
        first = self.nodes[0].name
        for batches, held_out in ((fit, False), (validation, True)):
            for images, labels in _pieces(batches):
                images = images.to(self.device)
                self.frontier.put(len(self.held_out), {first: Pair(images, images)})
                self.held_out.append(held_out)
                self.labels.append(labels)

    def positions(self) -> list[int]:
        """Of each node's value, how many positions an image has for one channel; 0 of no tensor."""
        first = self.nodes[0].name
        images = self.frontier.look(0)[first].dense.clone()
        environment = {first: Pair(images, images)}
        found = []
        with torch.no_grad():
            for node in self.nodes:
                if node.name not in environment:
                    self.dense.run(environment, [node])
                value = environment[node.name].dense
                known = isinstance(value, Tensor) and value.dim() > 1
                found.append(value[:, 0].numel() // len(images) if known else 0)
        return found

    def metrics(
        self, segments: list[Segment], loss: LossFunction | None, seed: int
    ) -> dict[int, Tensor]:
        """Return ``G^½ [channels, channels]`` at the end of every stretch that has channels."""
        moments: dict[int, Moments] = {}
        fitted = [b for b, held_out in enumerate(self.held_out) if not held_out]
        objective = Objective(sum(len(self.labels[b]) for b in fitted), seed, loss)
        for batch in fitted:
            environment = self.frontier.look(batch)
            images = environment[self.nodes[0].name].dense
            value = images.detach().clone().requires_grad_()
            ends, at = {}, 0
            for segment in segments:
                value = self._across(self.dense, at, segment.end, value)
                ends[segment.end], at = value, segment.end
            output = self._across(self.dense, at, len(self.nodes) - 2, value)
            total = objective(output, self.labels[batch])
            gradients = torch.autograd.grad(total, list(ends.values()), allow_unused=True)
            for end, gradient in zip(ends, gradients, strict=True):
                if gradient is not None and gradient.dim() in (2, 4):
                    rows = _channel_rows(gradient)
                    found = moments.setdefault(end, Moments(1, rows.shape[1], self.device))
                    found.update(rows.unsqueeze(0))
        return {
            end: square_roots(regularise(found.second_moment))[0][0].float()
            for end, found in moments.items()
        }

    def _across(self, network: Lockstep, start: int, end: int, value: Tensor) -> Tensor:
        """Take a value through the nodes after ``start`` up to ``end``."""
        if start == end:
            return value
        # A copy, since the first node may change it in place.
        value = value.clone()
        environment = {self.nodes[start].name: Pair(value, value)}
        keep = self.nodes[end].name
        for node in self.nodes[start + 1 : end + 1]:
            environment[node.name] = network.execute(node, environment)
        found: Tensor = environment[keep].dense
        return found

    def advance(self, segment: Segment) -> torch.Size:
        """Bring all batches to a stretch's start with what it should give; return its shape."""
        shape = torch.Size()
        with torch.no_grad():
            for batch in range(len(self.held_out)):
                (pair,) = self.frontier.take(batch).values()
                dense = self._across(self.dense, self.position, segment.start, pair.dense)
                given = self._across(self.compressed, self.position, segment.start, pair.compressed)
                target = self._across(self.dense, segment.start, segment.end, dense)
                shape = target.shape
                self.frontier.put(batch, {"stretch": Pair(target, given)})
        self.position = segment.start
        return shape

    def improve(
        self,
        segment: Segment,
        factors: Mapping[str, Factors],
        sites: Mapping[str, LayerSite],
        root: Tensor,
        seed: int,
    ) -> Improved:
        """Train the weights of a stretch; return the new ones, none where they are no better."""
        old = {n: copy.deepcopy(self.layers[n].state_dict()) for n in segment.layers}
        parameters = [p for n in segment.layers for p in self.layers[n].parameters()]
        before = self._error(segment, root)
        for parameter in parameters:
            parameter.requires_grad_()
        if before > 0:
            self._train(segment, parameters, root, before, seed)
        for parameter in parameters:
            parameter.requires_grad_(False)
        better = self._error(segment, root) < before * (1 - LEAST_GAIN)
        found = Improved({}, {})
        for name in segment.layers:
            if not better:
                self.layers[name].load_state_dict(old[name])
            elif name in factors:
                found.factors[name] = _read(self.layers[name], factors[name], sites[name])
                self.install(sites[name], found.factors[name])  # balanced anew
            else:
                found.kept[name] = self.layers[name].state_dict()
        return found

    def finish(self, segment: Segment) -> None:
        """Take all batches to the end of a stretch."""
        with torch.no_grad():
            for batch in range(len(self.held_out)):
                (pair,) = self.frontier.take(batch).values()
                reached = self._across(self.compressed, segment.start, segment.end, pair.compressed)
                self.frontier.put(batch, {"cut": Pair(pair.dense, reached)})
        self.position = segment.end

    def _train(
        self,
        segment: Segment,
        parameters: list[nn.Parameter],
        root: Tensor,
        scale: float,
        seed: int,
    ) -> None:
        """Adam with a falling step over the fit images, in a seeded order."""
        batches = [b for b, held_out in enumerate(self.held_out) if not held_out]
        each = max(STEP_IMAGES // len(self.labels[0]), 1)
        steps = [batches[i : i + each] for i in range(0, len(batches), each)]
        sizes = [float(p.detach().square().mean().sqrt().clamp_min(1e-3)) for p in parameters]
        groups = [{"params": [p], "lr": STEP * s} for p, s in zip(parameters, sizes, strict=True)]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
        total = EPOCHS * len(steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda step: 0.5 * (1 + math.cos(math.pi * step / total))
        )
        generator = torch.Generator().manual_seed(seed)
        for _ in range(EPOCHS):
            for index in torch.randperm(len(steps), generator=generator).tolist():
                adam.zero_grad()
                images = sum(len(self.labels[batch]) for batch in steps[index])
                for batch in steps[index]:
                    error, count = self._loss(segment, batch, root)
                    torch.autograd.backward(error * (count / images / scale))
                nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
                adam.step()
                schedule.step()

    def _loss(self, segment: Segment, batch: int, root: Tensor) -> tuple[Tensor, int]:
        """Weighted error of a batch, the mean over its images, and their number."""
        (pair,) = self.frontier.look(batch).values()
        output = self._across(self.compressed, segment.start, segment.end, pair.compressed)
        images = len(pair.compressed)
        return (_channel_rows(output - pair.dense) @ root).square().sum() / images, images

    @torch.no_grad()
    def _error(self, segment: Segment, root: Tensor) -> float:
        """Weighted error on the held-out batches."""
        found = [
            self._loss(segment, batch, root)
            for batch, held_out in enumerate(self.held_out)
            if held_out
        ]
        return sum(float(e) * n for e, n in found) / max(sum(n for _, n in found), 1)


def _read(chain: nn.Module, old: Factors, site: LayerSite) -> Factors:
    """The factors that a trained chain holds, balanced."""
    layers, weights = list(chain.children()), []
    for layer in layers:
        kind = kind_of(layer)
        assert kind is not None
        weights.append(kind.weight(layer).detach().double())
    bias = layers[-1].get_parameter("bias").detach().double()
    return replace(old, fit=with_weights(site.geometry, old.fit, tuple(weights)), bias=bias)
