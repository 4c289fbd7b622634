"""Holding a result to the limits of its run."""

from __future__ import annotations

from collections.abc import Iterable

from compress.config import RunConfig
from compress.result import EndMetric, GateResult, LayerResult


def check_gates(
    config: RunConfig, metric: EndMetric | None, layers: Iterable[LayerResult]
) -> tuple[GateResult, ...]:
    """Hold a result to the configuration's limits; what could not be measured has not passed."""
    gates = []
    if config.max_drop is not None:
        value = None if metric is None else metric.drop
        passed = value is not None and value <= config.max_drop
        gates.append(GateResult("max_drop", config.max_drop, value, passed))
    if config.min_agreement is not None:
        value = None if metric is None else metric.agreement
        passed = value is not None and value >= config.min_agreement
        gates.append(GateResult("min_agreement", config.min_agreement, value, passed))
    if config.max_layer_relative_mse is not None:
        worst, where = _worst_layer(layers)
        passed = worst <= config.max_layer_relative_mse
        gates.append(
            GateResult(
                "max_layer_relative_mse", config.max_layer_relative_mse, worst, passed, where
            )
        )
    return tuple(gates)


def _worst_layer(layers: Iterable[LayerResult]) -> tuple[float, str]:
    worst, where = 0.0, ""
    for layer in layers:
        error = layer.errors.validation_alone or layer.errors.fit_alone
        relative = None if error is None else error.relative_mse
        if relative is not None and relative > worst:
            worst, where = relative, layer.name
    return worst, where
