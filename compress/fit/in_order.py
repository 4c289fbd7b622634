"""Refitting layers in execution order to what the compressed network really feeds them.

After the rewrite every layer's input differs from what its factors were fitted on. Walking both
networks side by side, each layer is fitted again by ridge regression of the *original* network's
output on the *compressed* network's input (asymmetric reconstruction: Zhang, Zou, He & Sun,
"Accelerating Very Deep Convolutional Networks for Classification and Detection", 2015). Beyond
that paper, where a layer's output is added to a shortcut the target is what the *sum* lacks, and
all factors are refitted, not only the last, and errors are weighed by how smoothly they vary over
positions (`compress.fit.frequencies`). Layers that were kept stay as they are, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from compress.calibrate.fisher import Objective
from compress.fit.factors import Factors
from compress.fit.frequencies import Frequencies, measured
from compress.fit.frontier import Frontier, Pair, spill_folder
from compress.fit.lockstep import residual_partner
from compress.fit.regression import Layer, Refit, Rows, Sampling, most_rows, too_large
from compress.fit.walk import RefitImages, RefitSettings, Traced, Walk
from compress.layers import registered_kind
from compress.linalg.geometry import output_rows, patch_rows
from compress.network.sites import LayerSite
from compress.progress import Track, silent
from compress.running.forward import evaluation_mode


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
    once = [n for n in factors if len(sites[n].calls) == 1 and not too_large(sites[n].geometry)]
    by_alias = {a: n for n in once for a in sites[n].aliases}
    steps = [n for n in traced.graph.nodes if n.op == "call_module" and str(n.target) in by_alias]
    current = dict(factors)
    outcome: dict[str, Refit] = {}
    with torch.no_grad(), evaluation_mode(traced.model), spill_folder() as folder:
        walk = _InOrder(traced, Frontier(settings.cache_bytes, folder))
        for name, found in factors.items():
            walk.install(sites[name], found)
        walk.start(images)
        if settings.weigh:
            walk.frequencies = walk.measured(by_alias, settings)
        for node in track(steps, "refit", len(steps)):
            name = by_alias[str(node.target)]
            rows = walk.advance(node, sites[name], settings.seed)
            layer = Layer(sites[name], walk.layer(sites[name]), factors[name])
            found, outcome[name] = layer.solve(rows, settings.iterations)
            if found is not factors[name]:
                current[name] = found
                walk.install(sites[name], found)
    return current, outcome


# Images whose gradients tell how smooth errors may be: their power is a mean over all channels.
POWER_IMAGES = 64


class _InOrder(Walk):
    """The walk that stops at one layer after the other."""

    def __init__(self, traced: Traced, frontier: Frontier) -> None:
        super().__init__(traced, frontier)
        # What errors of layers cost by how smoothly they vary, once it is measured.
        self.frequencies: dict[str, Frequencies] = {}

    def measured(
        self, by_alias: Mapping[str, str], settings: RefitSettings
    ) -> dict[str, Frequencies]:
        """What errors of layers cost by how smoothly they vary, by name; from some fit images."""
        first = self.lockstep.nodes[0].name
        batches, images = [], 0
        for batch in self.batches(held_out=False):
            if images >= POWER_IMAGES:
                break
            batches.append((self.frontier.look(batch)[first].dense, self.labels[batch]))
            images += self.sizes[batch]
        objective = Objective(images, settings.seed, settings.loss, settings.reading)
        found = measured(
            self.traced.model, list(by_alias), batches, objective, in_place=settings.in_place
        )
        return {by_alias[alias]: frequencies for alias, frequencies in found.items()}

    def advance(self, node: fx.Node, site: LayerSite, seed: int) -> Rows:
        """Bring all batches to a node; return what its layer sees."""
        nodes = self.lockstep.nodes
        index = nodes.index(node)
        segment = nodes[self.position + 1 : index]
        partner = residual_partner(node, set(nodes[:index]), self.lockstep.modules)
        found = Rows.of(site, self.device, self.frequencies.get(site.name))
        sampling = Sampling(len(self.held_out), seed, self.device)
        needed = {source.name for n in (*segment, node) for source in n.all_input_nodes}
        needed |= set() if partner is None else {partner.name}
        for batch, held_out in enumerate(self.held_out):
            environment = self.frontier.take(batch, needed)
            self.lockstep.run(environment, segment)
            given, target = self._target(node, environment, partner, site)
            positions = sampling.positions(batch, target.shape, most_rows(site.geometry))
            patches = patch_rows(given, site.geometry, positions)
            targets = output_rows(target, site.geometry, positions)
            found.add(patches, targets, held_out=held_out)
            found.add_images(given, target, site, held_out=held_out)
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
        target = kind.images(self.cut.outputs_of(site.name, module(pair.dense)))
        if partner is not None and not environment[partner.name].same:
            other = environment[partner.name]
            before = self.cut.of_node(partner.name, other.dense)
            target = target + kind.images(before - other.compressed)
        return kind.images(pair.compressed), target
