"""Streaming calibration data through hooked layers into moments.

One pass over the images gives every statistic: the moments of each layer's outputs or, where they
are the cheaper side or a scheme needs them, of its patches; and the weighting ``G = E[g gᵀ]`` of
its outputs, with ``g`` a gradient whose covariance is the Fisher information of the model's own
prediction (`compress.calibrate.fisher`), so that no labels are needed. A hook consumes what it sees
at once: later in-place operations change the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from compress.calibrate.fisher import LossFunction, Objective
from compress.calibrate.pooled import channel_sketch, pooled_rows
from compress.calibrate.statistics import Calibration, LayerStatistics
from compress.errors import CalibrationError
from compress.layers import kind_of
from compress.linalg.geometry import output_rows, patch_rows
from compress.linalg.moments import Moments
from compress.linalg.schemes import OUTPUT, scheme_named
from compress.network.sites import LayerSite
from compress.running.finite import check_finite
from compress.running.forward import evaluation_mode, forward_hooks, frozen, run_model
from compress.running.memory_format import in_format, in_memory_format

# Layers take every position up to this many rows, however short those are: of patches, and of
# outputs and one-tap inputs, which have a tenth of the features.
FREE_PATCHES = 1 << 16
FREE_OUTPUTS = 1 << 13
# Longer patches than this are not accumulated for schemes that want them: the matrix alone would
# take more than half a gigabyte.
LONGEST_PATCH = 8192

WHEN = "on the calibration images"
REMEDY = "check the checkpoint and the normalisation (--mean, --std)"


def wants_patches(site: LayerSite, schemes: Iterable[str]) -> bool:
    """Whether patches are accumulated: cheaper than outputs, or needed by a scheme."""
    geometry = site.geometry
    if geometry.in_features < geometry.out_features:
        return True
    needed = {s for s in schemes if s in site.schemes and not scheme_named(s).closed_form}
    # For one-tap layers `input` can do nothing that `output` does not do better.
    taps = math.prod(geometry.kernel_size)
    return bool(needed) and taps > 1 and geometry.in_features <= LONGEST_PATCH


class _Positions:
    """The seeded choice of output positions for each image, the same for any batch split."""

    def __init__(self, images: int, budget: int, seed: int) -> None:
        self.per_image = math.ceil(budget / images)
        self.images, self.seed = images, seed
        self.tables: dict[tuple[int, int], Tensor] = {}

    def take(self, call: int, start: int, batch: int, positions: int) -> Tensor | None:
        """Positions ``[batch, samples]`` of images ``start ...``, or None for all of them."""
        if positions <= self.per_image:
            return None
        key = (call, positions)
        if key not in self.tables:
            generator = torch.Generator().manual_seed(self.seed + 7919 * call)
            shape = (self.images, self.per_image)
            # Stratified: one position in each of per_image equal stretches, spread over the image.
            edges = torch.arange(self.per_image, dtype=torch.float64)
            jitter = torch.rand(shape, generator=generator, dtype=torch.float64)
            table = ((edges + jitter) * (positions / self.per_image)).long()
            self.tables[key] = table.clamp_(max=positions - 1).to(torch.int32)
        return self.tables[key][start : start + batch].long()


class _Collector:
    """The hook of one site."""

    def __init__(
        self,
        site: LayerSite,
        module: nn.Module,
        patches: bool,
        positions: _Positions,
        weigh: bool,
        sketch: Tensor | None,
    ) -> None:
        kind = kind_of(module)
        assert kind is not None
        self.site, self.kind, self.positions = site, kind, positions
        g = site.geometry
        device = next(module.parameters()).device
        self.statistics = LayerStatistics(
            inputs=Moments(g.groups, g.in_features, device) if patches else None,
            outputs=None if patches else Moments(g.groups, g.out_features, device),
            weighting=Moments(g.groups, g.out_features, device) if weigh else None,
        )
        self.sketch = sketch
        if sketch is not None:
            length = g.in_features if patches else g.out_features
            self.statistics.pooled = Moments(g.groups, length + 1, device)
        self.start = self.batch = self.call = 0

    def begin(self, start: int, batch: int) -> None:
        """Get ready for a batch that starts at image ``start``."""
        self.start, self.batch, self.call = start, batch, 0

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        y = self.kind.images(output)
        # Half precision would overflow in the sum alone.
        total = y.detach().sum(dtype=torch.promote_types(y.dtype, torch.float32))
        if not math.isfinite(float(total)):
            raise CalibrationError(
                f"Layer {self.site.name!r} ({self.site.shape}) gave NaN or infinite activations "
                f"on the images from number {self.start}. The weights or the inputs are broken, "
                "or overflow: check the checkpoint and the normalisation (--mean, --std)."
            )
        taken = self._taken(y)
        moments, geometry = self.statistics, self.site.geometry
        with torch.no_grad():
            if moments.inputs is not None:
                moments.inputs.update(patch_rows(self.kind.images(inputs[0]), geometry, taken))
            elif moments.outputs is not None:
                moments.outputs.update(output_rows(y, geometry, taken))
        if moments.weighting is not None and output.requires_grad:
            rows = None
            if moments.pooled is not None and y.shape[0] % self.batch == 0:
                # A copy: what is changed in place later must not reach the gradient's hook.
                rows = (inputs[0] if moments.inputs is not None else output).detach().clone()
            self._watch(output, taken, rows)
        self.call += 1

    def _watch(self, output: Tensor, taken: Tensor | None, rows: Tensor | None) -> None:
        images = self.batch

        def hook(gradient: Tensor) -> None:
            self._weigh(gradient, taken)
            if rows is not None:
                self._pool(rows, gradient, images)

        output.register_hook(hook)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def _taken(self, y: Tensor) -> Tensor | None:
        if y.shape[0] % self.batch:  # the batch is not the leading axis: take every row
            return None
        positions = y.shape[0] // self.batch * y.shape[2] * y.shape[3]
        taken = self.positions.take(self.call, self.start, self.batch, positions)
        return None if taken is None else taken.to(y.device)

    def _weigh(self, gradient: Tensor, taken: Tensor | None) -> None:
        moments = self.statistics.weighting
        assert moments is not None
        moments.update(output_rows(self.kind.images(gradient), self.site.geometry, taken))

    def _pool(self, activation: Tensor, gradient: Tensor, images: int) -> None:
        pooled, sketch = self.statistics.pooled, self.sketch
        assert pooled is not None
        assert sketch is not None
        x, g = self.kind.images(activation), self.kind.images(gradient)
        patches = self.statistics.inputs is not None
        for rows in pooled_rows(x, g, self.site.geometry, patches, images, sketch):
            pooled.update(rows)


def calibrate(
    model: nn.Module,
    sites: Iterable[LayerSite],
    batches: Iterable[tuple[Tensor, Tensor]],
    images: int,
    *,
    schemes: Iterable[str] = (OUTPUT.name,),
    weigh: bool = True,
    pool: bool = False,
    loss: LossFunction | None = None,
    samples_per_dimension: int = 64,
    seed: int = 0,
    memory_format: str = "contiguous",
) -> Calibration:
    """Stream images through the model and accumulate every layer's statistics.

    Args:
        model: The network, norms folded; left as it was, whatever happens.
        sites: Its layers; kept ones are passed over.
        batches: Inputs ``[B, ...]`` and labels ``[B]`` (not looked at unless ``loss`` does).
        images: How many images the batches hold.
        schemes: The schemes in play; they decide which layers' patches are accumulated.
        weigh: Whether to accumulate the weighting ``G``.
        pool: Whether to accumulate rows pooled by gradient too, which `fit_problem` then uses.
        loss: ``(output, labels) -> summed loss`` for outputs that are no logits.
        samples_per_dimension: Sample budget of a layer, in multiples of its row length.
        seed: Decides the random signs and positions.
        memory_format: What the model runs in meanwhile, as `Network.memory_format`.

    Raises:
        CalibrationError: An activation is NaN or infinite; the layer is named.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    schemes = tuple(schemes)
    device = next(model.parameters()).device
    collectors: dict[nn.Module, _Collector] = {}
    for index, site in enumerate(s for s in sites if s.skip is None):
        patches = wants_patches(site, schemes)
        length = site.geometry.in_features if patches else site.geometry.out_features
        wide = patches and math.prod(site.geometry.kernel_size) > 1
        free = FREE_PATCHES if wide else FREE_OUTPUTS
        budget = max(free, samples_per_dimension * length) // max(len(site.calls), 1)
        positions = _Positions(images, budget, seed * 1_000_003 + index)
        module = modules[site.name]
        sketch = channel_sketch(site.geometry, images, seed).to(device) if weigh and pool else None
        collectors[module] = _Collector(site, module, patches, positions, weigh, sketch)
    objective, start = Objective(images, seed, loss), 0
    with (
        evaluation_mode(model),
        frozen(model),
        forward_hooks(dict(collectors)),
        in_memory_format(model, memory_format),
    ):
        for inputs, labels in batches:
            for collector in collectors.values():
                collector.begin(start, len(inputs))
            inputs = in_format(inputs.to(device), memory_format)
            if weigh:
                # An input that requires grad, so that gradients reach the first layer's output.
                output = run_model(model, inputs.detach().requires_grad_())
                check_finite(model, inputs, output.detach(), WHEN, REMEDY)
                _backward(objective(output, labels))
            else:
                with torch.no_grad():
                    run_model(model, inputs)
            start += len(inputs)
    statistics = {c.site.name: c.statistics for c in collectors.values()}
    for name, found in statistics.items():
        for role, moments in found.moments().items():
            if not moments.is_finite():
                raise CalibrationError(
                    f"The {role} of layer {name!r} have NaN or infinite moments on the calibration "
                    "images: the loss has no finite gradient there, or squares overflow. Check the "
                    "checkpoint and the normalisation (--mean, --std), or use --metric mse."
                )
    return Calibration(statistics, start, "loss" if weigh else "mse")


def _backward(value: Tensor) -> None:
    if not value.requires_grad:
        raise CalibrationError(
            "No gradient comes back from the model's output: its forward runs under torch.no_grad "
            "or torch.inference_mode, or detaches what it computes. Take that out of the forward, "
            "or use --metric mse."
        )
    torch.autograd.backward(value, inputs=None)
