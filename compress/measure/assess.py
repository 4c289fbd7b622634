"""Everything that is measured about a rewritten model, put into records."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.calibrate.held_out import HeldOutLoss
from compress.calibrate.statistics import FEW_SAMPLES
from compress.data import ImageSet, first_inputs
from compress.fit.layers import Replaced
from compress.inputs.load import Inputs
from compress.measure.accuracy import Yardstick, require_labels
from compress.measure.layers import measure_layers, measured_losses
from compress.network.baseline import Network
from compress.network.recurrent import RecurrentLayer
from compress.plan import Choice, Plan
from compress.result import (
    CostSummary,
    EndMetric,
    LayerErrors,
    LayerResult,
    MeasuredError,
    Progressive,
)
from compress.rules import Outcome, rule_named
from compress.running.structure import count, main_tensor, part, placed

# Spectra longer than this are cut in the report.
LONGEST_SPECTRUM = 256
# Each layer's own loss takes a forward pass, of so many images: the most as far as they take no
# more multiply-accumulates and pixels than these.
LEAST_IMAGES, MOST_IMAGES, MOST_MACS, MOST_PIXELS = 8, 64, 10e9, 1 << 21

Errors = Mapping[str, tuple[MeasuredError, MeasuredError]]


@dataclass(frozen=True)
class Rewritten:
    """What carrying out a plan came to.

    Attributes:
        plan: What was done.
        replaced: The rewritten model in float32 and its predictions.
        final: The same in the dtype it is saved in.
        cost: What it costs.
    """

    plan: Plan
    replaced: Replaced
    final: nn.Module
    cost: CostSummary


@dataclass(frozen=True)
class Assessment:
    """What was measured about a rewritten model."""

    layers: tuple[LayerResult, ...]
    validation: EndMetric | None
    test: EndMetric | None
    rank_correlation: float | None
    warnings: tuple[str, ...]
    progressive: Progressive | None = None


def assess(
    network: Network, rewritten: Rewritten, inputs: Inputs, yardstick: Yardstick
) -> Assessment:
    """Measure per-layer errors and end metrics.

    Args:
        network: The dense baseline.
        rewritten: What it became.
        inputs: Images.
        yardstick: What the networks are compared by.
    """
    plan, replaced = rewritten.plan, rewritten.replaced
    names = [c.name for c in plan.choices if c.rewritten]
    fit, validation = inputs.split.fit, inputs.split.validation

    def errors(images: ImageSet, describe: str) -> Errors:
        if not names or not len(images):
            return {}
        loaded = yardstick.loader.batches(images)
        tracked = yardstick.track(loaded, f"layer errors, {describe}", len(loaded))
        return measure_layers(network.model, replaced.model, names, tracked, replaced.cut)

    measured = _joined(plan, errors(fit, "fit"), errors(validation, "validation"))
    few = validation if len(validation) else fit
    alone = {n: loss.mean for n, loss in losses_alone(network, replaced, names, few).items()}
    element = next(rewritten.final.parameters()).element_size()
    layers = tuple(
        _layer(choice, replaced, _Measured(found, alone.get(choice.name), element))
        for choice, found in measured
    )

    kept = tuple(recurrent_result(layer, element) for layer in network.recurrent)

    def end_metric(images: ImageSet, describe: str) -> EndMetric:
        by = yardstick if describe == "test" else replace(yardstick, labels_fit=False)
        return by.compare(network.original, rewritten.final, images, describe)

    own = yardstick.metric is not None
    on_validation = (
        end_metric(validation, "validation") if comparable(network, validation, own=own) else None
    )
    on_test = None
    if inputs.test is not None:
        if not own:
            require_labels(inputs.test)
        on_test = end_metric(inputs.test, "test")
    correlation = rank_correlation(
        [(x.predicted_loss, x.measured_loss) for x in layers if x.rewritten]
    )
    warnings = (*_warnings(rewritten, layers), *_test_warnings(inputs, on_test))
    return Assessment(layers + kept, on_validation, on_test, correlation, warnings)


def _joined(plan: Plan, fit: Errors, validation: Errors) -> list[tuple[Choice, LayerErrors]]:
    joined = []
    for choice in plan.choices:
        on_fit, held_out = fit.get(choice.name), validation.get(choice.name)
        errors = LayerErrors(
            fit_alone=on_fit[0] if on_fit else None,
            fit_in_place=on_fit[1] if on_fit else None,
            validation_alone=held_out[0] if held_out else None,
            validation_in_place=held_out[1] if held_out else None,
        )
        joined.append((choice, errors))
    return joined


@dataclass(frozen=True)
class _Measured:
    """What was measured of one layer, and how many bytes a number of it takes as saved."""

    errors: LayerErrors
    loss: float | None
    element_size: int


def _layer(choice: Choice, replaced: Replaced, measured: _Measured) -> LayerResult:
    predicted = replaced.predicted.get(choice.name)
    known = predicted if choice.rewritten else None
    spectrum = predicted.eigenvalues if predicted else ()
    return LayerResult(
        name=choice.name,
        kind=choice.kind,
        shape=choice.shape,
        scheme=choice.scheme,
        ranks=choice.ranks,
        full_rank=choice.full_rank,
        break_even=choice.break_even,
        reason=choice.reason,
        refitted=choice.name in replaced.refitted,
        dense_macs=choice.dense_macs,
        macs=choice.macs,
        dense_params=choice.dense_params,
        params=choice.params,
        dense_bytes=choice.dense_params * measured.element_size,
        bytes=choice.params * measured.element_size,
        predicted_mse=known.mse if known else None,
        predicted_relative_mse=known.relative_mse if known else None,
        predicted_held_out_mse=known.held_out_mse if known else None,
        predicted_loss=known.loss if known else None,
        measured_loss=measured.loss,
        errors=measured.errors,
        eigenvalues=spectrum[:LONGEST_SPECTRUM],
        eigenvalue_count=len(spectrum) or None,
        samples=predicted.samples if predicted else None,
        samples_per_dimension=predicted.samples_per_dimension if predicted else None,
        dense_seconds=choice.dense_seconds,
        width=choice.width,
        seconds=choice.seconds,
    )


def recurrent_result(layer: RecurrentLayer, element_size: int) -> LayerResult:
    """A recurrent layer's row of a report: what it costs, and why it is kept.

    Args:
        layer: The layer.
        element_size: Bytes of a number as saved.
    """
    return LayerResult(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        reason=layer.reason,
        dense_macs=layer.macs,
        macs=layer.macs,
        dense_params=layer.params,
        params=layer.params,
        dense_bytes=layer.params * element_size,
        bytes=layer.params * element_size,
    )


def losses_alone(
    network: Network, replaced: Replaced, names: list[str], images: ImageSet
) -> dict[str, HeldOutLoss]:
    """Measured loss of rewriting each layer by itself, where the outputs can be compared.

    Args:
        network: The dense baseline.
        replaced: What it became.
        names: Of the rewritten layers.
        images: Of which the first few count, since each layer takes a forward pass.
    """
    if not names:
        return {}
    example = main_tensor(network.example)
    pixels = max(1, math.prod(example.shape[-2:]))
    most = min(MOST_IMAGES, int(MOST_MACS / max(1, network.macs)), MOST_PIXELS // pixels)
    inputs = placed(first_inputs(images, max(most, LEAST_IMAGES)), network.device)
    # Large pictures come few at a time, as outputs are compared in double precision.
    step = max(1, MOST_PIXELS // pixels)
    batches = [part(inputs, start, start + step) for start in range(0, count(inputs), step)]
    return measured_losses(network, replaced.fitted, names, batches, replaced.cut)


def comparable(network: Network, images: ImageSet, *, own: bool) -> bool:
    """Whether images say anything of an end metric; with a measure of the user's ``own`` any do."""
    return len(images) > 0 and (
        own or not network.reading.ranked or len(set(images.labels)) > 1 or min(images.labels) < 0
    )


def rank_correlation(pairs: list[tuple[float | None, float | None]]) -> float | None:
    """Spearman's rank correlation of predicted and measured losses; None below three layers."""
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    if len(known) < 3:
        return None
    ranks = [
        _ranks(torch.tensor(column, dtype=torch.float64)) for column in zip(*known, strict=True)
    ]
    centred = [r - r.mean() for r in ranks]
    scale = float(centred[0].norm() * centred[1].norm())
    return float(centred[0] @ centred[1]) / scale if scale > 0 else None


def _ranks(values: Tensor) -> Tensor:
    """Ranks with ties averaged."""
    below = (values.unsqueeze(0) < values.unsqueeze(1)).sum(1)
    equal = (values.unsqueeze(0) == values.unsqueeze(1)).sum(1)
    return below.double() + (equal - 1) / 2.0


def _warnings(rewritten: Rewritten, layers: tuple[LayerResult, ...]) -> Iterator[str]:
    few = [
        (x.samples_per_dimension, x.name)
        for x in layers
        if x.samples_per_dimension is not None and x.samples_per_dimension < FEW_SAMPLES
    ]
    if few:
        samples, worst = min(few)
        yield (
            f"{len(few)} layer(s) have fewer than {FEW_SAMPLES} samples a dimension (least: "
            f"{worst or 'the model itself'} with {samples:.2g}); their statistics were shrunk. Use "
            "more --calibration-images."
        )
    latency = rewritten.cost.latency
    for timed in latency:
        if timed.ratio >= 1 and any(x.rewritten for x in layers):
            yield (
                f"At batch {timed.batch_size} the result is not faster than the dense network "
                f"with its norms folded ({timed.ratio:.2f} of its time on this device)."
            )
    rule = rule_named(rewritten.plan.rule)
    costs = rewritten.cost
    dense = costs.folded.macs if costs.folded else 0
    macs = costs.compressed.macs / dense if costs.compressed and dense else 1.0
    last = (latency[-1].batch_size, latency[-1].ratio) if latency else (0, 0.0)
    remark = rule and rule.remark(Outcome(rewritten.plan.value or 0.0, macs, *last))
    if remark:
        yield remark


def _test_warnings(inputs: Inputs, test: EndMetric | None) -> Iterator[str]:
    if test is not None and test.near_chance:
        yield (
            "The original is hardly better than chance on the test images; check the order of the "
            "classes (--class-map) and the normalisation (--mean, --std)."
        )
    if inputs.test is None:
        yield "Unverified: no test set was given (--test)."
