"""A run's result held to the limits of its configuration, as a report of it is."""

from __future__ import annotations

import pytest

from compress.report import build_report, check_gates, judged
from compress.result import EndMetric, LayerErrors, LayerResult, MeasuredError, Result, Versions

VERSIONS = Versions("0", "0", "0")


def layer(name: str, relative: float | None) -> LayerResult:
    """A layer that errs more alone than in place."""
    errors = LayerErrors(
        validation_alone=MeasuredError(1.0, None if relative is None else 10 * relative),
        validation_in_place=MeasuredError(1.0, relative),
    )
    return LayerResult(name=name, kind="Conv2d", scheme="output", errors=errors)


def result(metric: EndMetric | None, *layers: LayerResult) -> Result:
    return Result(versions=VERSIONS, model="", layers=layers, test=metric)


@pytest.mark.parametrize(
    ("limits", "passed"),
    [
        ({"max_drop": 1.0}, True),
        ({"max_drop": 0.5}, True),
        ({"max_drop": 0.49}, False),
        ({"min_agreement": 0.98}, True),
        ({"min_agreement": 0.981}, False),
        ({"max_layer_relative_mse": 0.2}, True),
        ({"max_layer_relative_mse": 0.19}, False),
        ({"max_drop": 1.0, "min_agreement": 0.99}, False),
    ],
)
def test_limits_hold_at_their_value(limits: dict[str, float], passed: bool) -> None:
    metric = EndMetric(images=100, drop=0.5, agreement=0.98)
    made = result(metric, layer("a", 0.1), layer("b", 0.2), layer("c", None))
    gates = judged(made, limits).gates
    assert len(gates) == len(limits)
    assert all(g.passed for g in gates) == passed
    for gate in gates:
        if gate.name == "max_layer_relative_mse":
            assert (gate.where, gate.value) == ("b", 0.2), "in place, not alone"
    assert list(gates) == check_gates(build_report(made), limits), "a report says the same"


def test_what_was_not_measured_has_not_passed() -> None:
    limits = {"max_drop": 100.0, "min_agreement": 0.0}
    for metric in (None, EndMetric(images=3)):
        assert [g.passed for g in judged(result(metric), limits).gates] == [False, False]
    assert judged(result(None), {}).gates == ()
