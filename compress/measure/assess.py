"""Everything that is measured about a rewritten model, put into records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.calibrate.statistics import FEW_SAMPLES
from compress.config import RunConfig
from compress.data import ImageSet, batches
from compress.fit.layers import Replaced
from compress.fit.predict import PredictedError
from compress.inputs.functions import metric_function
from compress.inputs.load import Inputs
from compress.measure.accuracy import compare, require_labels
from compress.measure.gates import check_gates
from compress.measure.layers import measure_layers, measured_losses
from compress.network.baseline import Network
from compress.plan import Choice, Plan
from compress.progress import Track
from compress.result import (
    CostSummary,
    EndMetric,
    GateResult,
    LayerErrors,
    LayerResult,
    MeasuredError,
)
from compress.running.forward import run_model

# Spectra longer than this are cut in the report.
LONGEST_SPECTRUM = 256
# Images that each layer's own loss is measured on: one forward pass a layer.
LOSS_PIXELS = 64 * 32 * 32

Errors = Mapping[str, tuple[MeasuredError, MeasuredError]]


@dataclass(frozen=True)
class Assessment:
    """What was measured about a rewritten model."""

    layers: tuple[LayerResult, ...]
    validation: EndMetric | None
    test: EndMetric | None
    gates: tuple[GateResult, ...]
    rank_correlation: float | None
    warnings: tuple[str, ...]


def assess(
    network: Network,
    plan: Plan,
    replaced: Replaced,
    final: nn.Module,
    cost: CostSummary,
    inputs: Inputs,
    config: RunConfig,
    batch_size: int,
    track: Track,
) -> Assessment:
    """Measure per-layer errors and end metrics, and hold everything measured to the gates.

    Args:
        network: The dense baseline.
        plan: What was done.
        replaced: The rewritten model in float32 and its predictions.
        final: The same in the dtype and memory format it is saved in.
        cost: What it costs.
        inputs: Images.
        config: Gates and batches.
        batch_size: Images a batch.
        track: Progress.
    """
    names = [c.name for c in plan.choices if c.rewritten]
    fit, validation = inputs.split.fit, inputs.split.validation

    def errors(images: ImageSet, describe: str) -> Errors:
        if not names or not len(images):
            return {}
        loaded = batches(images, batch_size, config.workers)
        tracked = track(loaded, f"layer errors, {describe}", len(loaded))
        return measure_layers(network.model, replaced.model, names, tracked)

    losses = _losses(network, replaced, names, validation if len(validation) else fit)
    layers = tuple(
        _layer(
            _told(choice, replaced),
            replaced.predicted.get(choice.name),
            found,
            losses.get(choice.name),
        )
        for choice, found in _joined(plan, errors(fit, "fit"), errors(validation, "validation"))
    )
    metric = metric_function(config)

    def end_metric(images: ImageSet, describe: str) -> EndMetric:
        return compare(
            network.original, final, images, config,
            batch_size=batch_size, metric=metric, describe=describe, track=track,
        )  # fmt: skip

    on_validation = (
        end_metric(validation, "validation") if _comparable(network, validation, metric) else None
    )
    on_test = None
    if inputs.test is not None:
        if metric is None:
            require_labels(inputs.test)
        on_test = end_metric(inputs.test, "test")
    gates = check_gates(config, on_test, layers)
    warnings = _warnings(plan, layers, cost, on_test, inputs)
    correlation = rank_correlation(
        [(x.predicted_loss, x.measured_loss) for x in layers if x.rewritten]
    )
    return Assessment(layers, on_validation, on_test, gates, correlation, warnings)


def _told(choice: Choice, replaced: Replaced) -> Choice:
    """A choice whose reason says so where the weights of a dense layer were refitted."""
    if choice.rewritten or choice.name not in replaced.refitted:
        return choice
    return dataclasses.replace(choice, reason=f"{choice.reason}; its weights were refitted")


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


def _layer(
    choice: Choice,
    predicted: PredictedError | None,
    errors: LayerErrors,
    measured_loss: float | None,
) -> LayerResult:
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
        dense_macs=choice.dense_macs,
        macs=choice.macs,
        dense_params=choice.dense_params,
        params=choice.params,
        dense_bytes=None,
        predicted_mse=known.mse if known else None,
        predicted_relative_mse=known.relative_mse if known else None,
        predicted_held_out_mse=known.held_out_mse if known else None,
        predicted_loss=known.loss if known else None,
        measured_loss=measured_loss,
        errors=errors,
        eigenvalues=spectrum[:LONGEST_SPECTRUM],
        eigenvalue_count=len(spectrum) or None,
        samples=predicted.samples if predicted else None,
        samples_per_dimension=predicted.samples_per_dimension if predicted else None,
        dense_seconds=choice.dense_seconds,
        seconds=choice.seconds,
    )


def _losses(
    network: Network, replaced: Replaced, names: list[str], images: ImageSet
) -> dict[str, float]:
    """Measured loss of each layer alone, where the outputs are logits."""
    if not names or not _is_classifier(network):
        return {}
    example = network.example
    count = max(8, LOSS_PIXELS // max(1, example.shape[-1] * example.shape[-2]))
    chosen = range(min(count, len(images)))
    inputs = images.stack(list(chosen)).to(example)
    aliases = {name: network.site(name).aliases for name in names}
    return measured_losses(network.model, replaced.fitted, aliases, inputs)


def _is_classifier(network: Network) -> bool:
    with torch.inference_mode():
        output = run_model(network.model, network.example)
    return output.dim() == 2 and output.shape[1] > 1


def _comparable(network: Network, images: ImageSet, metric: object) -> bool:
    return (
        len(images) > 0
        and (metric is not None or _is_classifier(network))
        and (metric is not None or len(set(images.labels)) > 1 or min(images.labels) < 0)
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


def _warnings(
    plan: Plan,
    layers: tuple[LayerResult, ...],
    cost: CostSummary,
    test: EndMetric | None,
    inputs: Inputs,
) -> tuple[str, ...]:
    found = []
    few = [
        x
        for x in layers
        if x.samples_per_dimension is not None and x.samples_per_dimension < FEW_SAMPLES
    ]
    if few:
        worst = min(few, key=lambda x: x.samples_per_dimension or 0.0)
        found.append(
            f"{len(few)} layer(s) have fewer than {FEW_SAMPLES} samples a dimension (least: "
            f"{worst.name} with {worst.samples_per_dimension:.2g}); their statistics were shrunk. "
            "Use more --calibration-images."
        )
    before = sum(x.dense_macs for x in layers)
    after = sum(x.macs for x in layers)
    if plan.rule in ("threshold", "energy") and after > 0.95 * before:
        found.append(
            f"The {plan.rule} rule left {100 * after / max(before, 1):.1f}% of the MACs. To set a "
            "size instead, pass --macs 0.5 or --params 0.5."
        )
    for latency in cost.latency:
        if latency.ratio >= 1 and any(x.rewritten for x in layers):
            found.append(
                f"At batch {latency.batch_size} the result is not faster than the dense network "
                f"with its norms folded ({latency.ratio:.2f} of its time on this device)."
            )
    timed = cost.latency[-1] if cost.latency else None
    if plan.rule == "latency" and timed is not None and timed.ratio > (plan.value or 1.0):
        found.append(
            f"Measured again after the fit, a batch of {timed.batch_size} takes "
            f"{timed.ratio:.3f} of the dense network's time, over the budget of {plan.value:g}: "
            "the machine does other work, or its speed drifts. Run again on a quiet machine, or "
            "with a smaller budget."
        )
    if test is not None and test.near_chance:
        found.append(
            "The original is hardly better than chance on the test images; check the order of the "
            "classes (--class-map) and the normalisation (--mean, --std)."
        )
    if inputs.test is None:
        found.append("Unverified: no test set was given (--test).")
    return tuple(found)
