"""Limits on a report: what continuous integration asks of a compressed network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from compress.errors import UsageError, near_matches
from compress.report import text
from compress.report.build import Report, build_report, switched_off
from compress.result import GateResult, Result


@dataclass(frozen=True)
class Limit:
    """A limit that a report can be held to.

    Attributes:
        label: What it limits, in words.
        unit: ``"points"``, ``"fraction"``, ``"ratio"`` or ``"number"``.
        measure: Reads the value and where it was found, ``(None, reason)`` if it is not there.
        at_least: Whether the limit is a lower one.
    """

    label: str
    unit: str
    measure: Callable[[Report], tuple[float | None, str]]
    at_least: bool = False


def check_gates(report: Report, limits: Mapping[str, float]) -> list[GateResult]:
    """Hold a run's report to limits, by the names in `LIMITS`.

    What was not measured does not pass: a report without a test set breaks every limit on
    accuracy, because nothing vouches for it.

    Raises:
        UsageError: A limit is unknown.
    """
    results = []
    for name, limit in limits.items():
        if name not in LIMITS:
            raise UsageError(
                f"There is no limit {name!r}.{near_matches(name, LIMITS)} "
                f"The limits are {', '.join(LIMITS)}."
            )
        value, where = LIMITS[name].measure(report)
        passed = value is not None and (value >= limit if LIMITS[name].at_least else value <= limit)
        results.append(GateResult(name, limit, value, passed, where, *_of_what(name, report)))
    return results


def _of_what(name: str, report: Report) -> tuple[str, str]:
    """Say what a limit on accuracy limits where another measure decides, and in which unit."""
    head = report["headline"]
    if name not in _ON_THE_MEASURE or head["metric"] == "accuracy":
        return "", ""
    label = LIMITS[name].label.replace("accuracy", head["metric"])
    if head["lower_is_better"]:
        label = label.replace("drop", "rise").replace("loss", "rise")
    return label, "points" if head["unit"] == "fraction" else head["unit"] or "number"


def judged(result: Result, limits: Mapping[str, float]) -> Result:
    """Return a result held to limits, by the names in `LIMITS`.

    Raises:
        UsageError: A limit is unknown.
    """
    return replace(result, gates=tuple(check_gates(build_report(result), limits)))


def gate_sentence(gate: GateResult) -> str:
    """Say how a limit went and, where it broke, by how much."""
    known = LIMITS.get(gate.name)
    label = gate.label or (known.label if known else gate.name.replace("_", " "))
    unit = gate.unit or (known.unit if known else "number")
    bound = "at least" if known and known.at_least else "at most"
    limit = _show(gate.limit, unit)
    if gate.value is None:
        return (
            f"{label}: not measured ({gate.where or 'no test set'}); the limit is {bound} {limit}"
        )
    at = f" ({gate.where})" if gate.where else ""
    shown = f"{label} is {_show(gate.value, unit)}{at}; the limit is {bound} {limit}"
    broken = f"{shown}, broken by {_show(abs(gate.value - gate.limit), unit)}"
    return shown if gate.passed else broken


def _show(value: float, unit: str) -> str:
    if unit == "points":
        return f"{value:.2f} points".replace("-", text.MINUS)
    if unit == "fraction":
        return text.percent(value)
    if unit == "dB":
        return f"{value:.2f} dB".replace("-", text.MINUS)
    return text.ratio(value) if unit == "ratio" else text.number(value)


def _of_test(key: str) -> Callable[[Report], tuple[float | None, str]]:
    def measure(report: Report) -> tuple[float | None, str]:
        metric = report["result"]["test"]
        if metric is None:
            return None, "no test set"
        value = metric[key]
        return (None, "no class labels") if value is None else (float(value), "")

    return measure


def _upper_drop(report: Report) -> tuple[float | None, str]:
    metric = report["result"]["test"]
    if metric is None:
        return None, "no test set"
    interval = metric["drop_interval"]
    return (float(interval["high"]), "") if interval else (None, "no class labels")


def _worst_class(report: Report) -> tuple[float | None, str]:
    metric = report["result"]["test"]
    if metric is None:
        return None, "no test set"
    rows = [r for r in metric["per_class"] if r["change"] is not None]
    if not rows:
        return None, "no class labels"
    worst = min(rows, key=lambda r: float(r["change"]))
    return 0.0 - float(worst["change"]), worst["name"]


def _worst_layer(report: Report) -> tuple[float | None, str]:
    worst, where = None, "no layer was measured in place"
    for layer in report["result"]["layers"]:
        error = layer["errors"]["validation_in_place"] or layer["errors"]["fit_in_place"]
        value = error["relative_mse"] if error else None
        if value is not None and (worst is None or value > worst):
            worst, where = float(value), layer["name"]
    if worst is None and report["headline"]["rewritten"] == 0:
        return 0.0, "no layer was rewritten"
    return worst, where


def _worst_latency(report: Report) -> tuple[float | None, str]:
    rows = report["result"]["cost"]["latency"]
    if not rows:
        asked = ", as --no-latency asks" if switched_off(report) else ""
        return None, f"latency was not measured{asked}"
    worst = max(rows, key=lambda r: float(r["ratio"]))
    return float(worst["ratio"]), f"batch {worst['batch_size']}"


def _of_headline(key: str) -> Callable[[Report], tuple[float | None, str]]:
    def measure(report: Report) -> tuple[float | None, str]:
        value = report["headline"][key]
        return (None, "not measured") if value is None else (float(value), "")

    return measure


def _ece_rise(report: Report) -> tuple[float | None, str]:
    metric = report["result"]["test"]
    if metric is None:
        return None, "no test set"
    if metric["ece_before"] is None or metric["ece_after"] is None:
        return None, "no class labels"
    return 100.0 * (metric["ece_after"] - metric["ece_before"]), ""


def _regression(report: Report) -> tuple[float | None, str]:
    if report["baseline"] is None:
        return None, "no baseline report was given"
    for row in report["baseline"]["rows"]:
        if row["key"] == "after" and row["change"] is not None:
            sign = 1.0 if report["headline"]["lower_is_better"] else -1.0
            return 0.0 + sign * float(row["change"]), "against the baseline"
    return None, "the baseline has no accuracy"


# Limits that whatever measure decides is held to, in its own unit.
_ON_THE_MEASURE = ("max_drop", "max_drop_upper", "max_class_drop", "max_regression")

LIMITS: Mapping[str, Limit] = {
    "max_drop": Limit("drop of accuracy", "points", _of_test("drop")),
    "max_drop_upper": Limit("upper end of the drop's 95% interval", "points", _upper_drop),
    "max_class_drop": Limit("drop of the worst class", "points", _worst_class),
    "min_agreement": Limit("agreement", "fraction", _of_test("agreement"), at_least=True),
    "max_kl": Limit("mean KL divergence", "number", _of_test("mean_kl")),
    "max_ece_rise": Limit("rise of the calibration error", "points", _ece_rise),
    "max_layer_relative_mse": Limit(
        "relative error of the worst layer, in place", "number", _worst_layer
    ),
    "max_latency_ratio": Limit("latency ratio at the slowest batch", "ratio", _worst_latency),
    "max_macs_ratio": Limit("MACs ratio", "ratio", _of_headline("macs_ratio")),
    "max_params_ratio": Limit("parameter ratio", "ratio", _of_headline("params_ratio")),
    "max_bytes_ratio": Limit("size ratio", "ratio", _of_headline("bytes_ratio")),
    "max_regression": Limit("loss of accuracy since the baseline", "points", _regression),
}
