"""Streaming calibration data through hooked layers into moments.

One pass over the images gives every statistic: the moments of each layer's outputs or, where they
are the cheaper side or a scheme needs them, of its patches; and the weighting ``G = E[g gᵀ]`` of
its outputs, with ``g`` a gradient whose covariance is the Fisher information of the model's own
prediction (`compress.calibrate.fisher`), so that no labels are needed. A hook consumes what it sees
at once: later in-place operations change the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress.calibrate.fisher import Objective
from compress.calibrate.pooled import Pool, channel_sketch, recentre
from compress.calibrate.recipe import Recipe
from compress.calibrate.statistics import Calibration, LayerStatistics, Source
from compress.errors import CalibrationError, GradientError
from compress.layers import registered_kind
from compress.linalg.geometry import output_rows, patch_rows
from compress.linalg.moments import Moments
from compress.linalg.schemes import scheme_named
from compress.network.sites import LayerSite
from compress.running.finite import check_finite
from compress.running.forward import (
    backward,
    changes_allowed,
    evaluation_mode,
    forward_hooks,
    frozen,
    gradients_begin,
    run_model,
    run_with_gradients,
)
from compress.running.memory_format import in_memory_format
from compress.running.structure import count, floating, placed, tensors, with_gradients

# Layers take every position up to this many rows, however short those are: of patches, and of
# outputs and one-tap inputs, which have a tenth of the features.
FREE_PATCHES = 1 << 16
FREE_OUTPUTS = 1 << 13

WHEN = "on the calibration images"
REMEDY = "check the checkpoint and the normalisation (--mean, --std)"
INSTEAD = ", or use --metric mse"
NO_EFFECT = (
    "The gradients of the loss are zero at every layer, so they do not tell what an error costs: "
    "what the loss is computed of is rounded, compared or reduced to an index."
)


def wants_patches(site: LayerSite, recipe: Recipe) -> bool:
    """Whether patches are accumulated: cheaper than outputs, or needed."""
    geometry = site.geometry
    if geometry.in_features < geometry.out_features or site.name in recipe.readers:
        return True
    needed = {s for s in recipe.schemes if s in site.schemes and not scheme_named(s).closed_form}
    # For one-tap layers `input` can do nothing that `output` does not do better.
    return bool(needed) and math.prod(geometry.kernel_size) > 1


class _Positions:
    """The seeded choice of output positions for each image, the same for any batch split."""

    def __init__(self, images: int, budget: int, seed: int) -> None:
        self.per_image = math.ceil(budget / images)
        self.images, self.seed = images, seed
        self.tables: dict[int, Tensor] = {}

    def take(self, call: int, start: int, batch: int, positions: int) -> Tensor | None:
        """Positions ``[batch, samples]`` of images ``start ...``, or None for all of them."""
        if positions <= self.per_image:
            return None
        if call not in self.tables:
            generator = torch.Generator().manual_seed(self.seed + 7919 * call)
            shape = (self.images, self.per_image)
            self.tables[call] = torch.rand(shape, generator=generator, dtype=torch.float64)
        # Stratified: one position in each of per_image equal stretches, spread over the image.
        edges = torch.arange(self.per_image, dtype=torch.float64)
        places = edges + self.tables[call][start : start + batch]
        return (places * (positions / self.per_image)).long().clamp_(max=positions - 1)


class _Collector:
    """The hook of one site.

    Args:
        site: The layer.
        module: The same in the network.
        recipe: Which statistics are taken.
        positions: Which output positions of each image.
    """

    def __init__(
        self, site: LayerSite, module: nn.Module, recipe: Recipe, positions: _Positions
    ) -> None:
        self.site, self.kind, self.positions = site, registered_kind(module), positions
        g, patches = site.geometry, wants_patches(site, recipe)
        device = next(module.parameters()).device
        self.statistics = LayerStatistics(
            inputs=Moments(g.groups, g.in_features, device) if patches else None,
            outputs=None if patches else Moments(g.groups, g.out_features, device),
            weighting=Moments(g.groups, g.out_features, device) if recipe.weigh else None,
        )
        self.pool: Pool | None = None
        if recipe.weigh and recipe.pool:
            sketch = channel_sketch(g, positions.images, recipe.seed).to(device)
            self.pool = Pool(g, sketch, patches)
            length = g.in_features if patches else g.out_features
            self.statistics.pooled = Moments(g.groups, length + 1, device)
        self.start = self.batch = self.call = 0

    def begin(self, start: int, batch: int) -> None:
        """Get ready for a batch that starts at image ``start``."""
        self.start, self.batch, self.call = start, batch, 0

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        y = self.kind.images(output)
        # In half precision the sum alone would overflow.
        total = y.detach().sum(dtype=torch.promote_types(y.dtype, torch.float32))
        if not math.isfinite(float(total)):
            raise CalibrationError(
                f"Layer {self.site.name!r} ({self.site.shape}) gave NaN or infinite activations "
                f"on the images from number {self.start}. The weights or the inputs are broken, "
                "or overflow: check the checkpoint and the normalisation (--mean, --std)."
            )
        taken = self._taken(y)
        moments, geometry = self.statistics, self.site.geometry
        if moments.inputs is not None:
            rows = self.kind.images(inputs[0].detach())
            moments.inputs.update(patch_rows(rows, geometry, taken))
        elif moments.outputs is not None:
            moments.outputs.update(output_rows(y.detach(), geometry, taken))
        if moments.weighting is not None and output.requires_grad:
            kept = None
            if moments.pooled is not None and len(y) and y.shape[0] % self.batch == 0:
                # A copy: what is changed in place later must not reach the gradient's hook.
                kept = (inputs[0] if moments.inputs is not None else output).detach().clone()
                if self.pool is not None and self.pool.reference is None:
                    self.pool.reference = moments.rows.mean
            self._watch(output, moments.weighting, taken, kept)
        self.call += 1

    def finish(self) -> LayerStatistics:
        """Return what was seen, pooled rows centred on the mean of all images."""
        found, pool = self.statistics, self.pool
        if found.pooled is not None and pool is not None and pool.reference is not None:
            recentre(found.pooled, found.rows.mean - pool.reference)
        return found

    def _watch(
        self, output: Tensor, weighting: Moments, taken: Tensor | None, rows: Tensor | None
    ) -> None:
        images, pooled, pool = self.batch, self.statistics.pooled, self.pool

        def hook(gradient: Tensor) -> None:
            g = self.kind.images(gradient)
            weighting.update(output_rows(g, self.site.geometry, taken))
            if rows is not None and pooled is not None and pool is not None:
                for pooled_rows in pool.rows(self.kind.images(rows), g, images):
                    pooled.update(pooled_rows)

        output.register_hook(hook)

    def _taken(self, y: Tensor) -> Tensor | None:
        if y.shape[0] % self.batch:  # the batch is not the leading axis: take every row
            return None
        positions = y.shape[0] // self.batch * math.prod(y.shape[2:])
        taken = self.positions.take(self.call, self.start, self.batch, positions)
        return None if taken is None else taken.to(y.device)


def calibrate(
    model: nn.Module,
    sites: Iterable[LayerSite],
    batches: Iterable[tuple[Any, Any]],
    source: Source,
    recipe: Recipe = Recipe(),
) -> Calibration:
    """Stream images through the model and accumulate every layer's statistics.

    Args:
        model: The network, norms folded; left as it was, whatever happens.
        sites: Its layers; kept ones are passed over.
        batches: Inputs ``[B, ...]`` and targets, which only the recipe's loss looks at.
        source: How many images the batches hold, and what they and the model are.
        recipe: Which statistics are taken, and how.

    Raises:
        CalibrationError: An activation is NaN or infinite; the layer is named.
        GradientError: No gradient comes back, or only zeros.
    """
    collectors = _collectors(model, sites, source.images, recipe)
    stream(model, collectors, batches, source, recipe)
    statistics = {c.site.name: c.finish() for c in collectors.values()}
    _check_moments(statistics)
    return Calibration(statistics, source, "loss" if recipe.weigh else "mse")


class Watcher(Protocol):
    """A hook of one layer that is told of each batch."""

    def begin(self, start: int, batch: int) -> None:
        """Get ready for a batch that starts at image ``start``."""

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, /) -> None:
        """See the layer's input and output."""


def stream(
    model: nn.Module,
    collectors: Mapping[nn.Module, Watcher],
    batches: Iterable[tuple[Any, Any]],
    source: Source,
    recipe: Recipe,
) -> None:
    """Run images through a model under hooks, and gradients back; arguments as `calibrate`.

    Raises:
        CalibrationError: An activation is NaN or infinite.
        GradientError: No gradient comes back.
    """
    seen = 0
    with (
        evaluation_mode(model),
        frozen(model),
        forward_hooks(dict(collectors)),
        in_memory_format(model, source.memory_format),
        ExitStack() as stack,
    ):
        objective = Objective(source.images, recipe.seed, recipe.loss, recipe.reading)
        device = next(model.parameters()).device
        for inputs, targets in batches:
            for collector in collectors.values():
                collector.begin(seen, count(inputs))
            inputs = placed(inputs, device, source.memory_format)
            if recipe.weigh and not seen and len(floating(inputs)) < len(tensors(inputs)):
                stack.enter_context(gradients_begin(model))
            if recipe.weigh:
                # An input that requires grad, so that gradients reach the first layer's output.
                with changes_allowed(in_place=recipe.in_place):
                    result = run_with_gradients(model, with_gradients(inputs))
                    check_finite(model, inputs, result, WHEN, REMEDY)
                    backward(objective(result, targets), INSTEAD)
            else:
                with torch.no_grad():
                    run_model(model, inputs)
            seen += count(inputs)


def _collectors(
    model: nn.Module, sites: Iterable[LayerSite], images: int, recipe: Recipe
) -> dict[nn.Module, _Collector]:
    modules = dict(model.named_modules(remove_duplicate=False))
    collectors: dict[nn.Module, _Collector] = {}
    for index, site in enumerate(s for s in sites if s.skip is None):
        patches = wants_patches(site, recipe)
        length = site.geometry.in_features if patches else site.geometry.out_features
        wide = patches and math.prod(site.geometry.kernel_size) > 1
        free = FREE_PATCHES if wide else FREE_OUTPUTS
        budget = max(free, recipe.samples_per_dimension * length) // max(len(site.calls), 1)
        positions = _Positions(images, budget, recipe.seed * 1_000_003 + index)
        module = modules[site.name]
        collectors[module] = _Collector(site, module, recipe, positions)
    return collectors


def _check_moments(statistics: Mapping[str, LayerStatistics]) -> None:
    for name, found in statistics.items():
        for role, moments in found.moments().items():
            if not moments.is_finite():
                raise CalibrationError(
                    f"The {role} of layer {name!r} have NaN or infinite moments on the calibration "
                    "images: the loss has no finite gradient there, or squares overflow. Check the "
                    "checkpoint and the normalisation (--mean, --std), or use --metric mse."
                )
    weighted = [found.weighting for found in statistics.values() if found.weighting is not None]
    if weighted and not any(moments.any() for moments in weighted):
        raise GradientError(NO_EFFECT, f"Pass one that changes with the outputs{INSTEAD}.")
