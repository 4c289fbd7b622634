"""Reports set against each other: an earlier version of the same model, or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.errors import UsageError
from compress.report.build import REPORT_FORMAT, Report, end_metric


@dataclass(frozen=True)
class _Figure:
    """One figure that is compared with the baseline's."""

    key: str
    label: str
    unit: str
    less_is_better: bool


_ROWS = (
    _Figure("after", "metric after compression", "accuracy", False),
    _Figure("drop", "drop", "points", True),
    _Figure("agreement", "agreement", "fraction", False),
    _Figure("mean_kl", "mean KL", "number", True),
    _Figure("ece_after", "calibration error (ECE)", "fraction", True),
    _Figure("macs_ratio", "MACs ratio", "ratio", True),
    _Figure("params_ratio", "parameter ratio", "ratio", True),
    _Figure("bytes_ratio", "size ratio", "ratio", True),
    _Figure("latency_ratio", "latency ratio", "ratio", True),
)


def compare_with_baseline(
    report: Report,
    baseline: Report,
    *,
    allow_mismatch: bool = False,
    name: str = "the baseline",
) -> Report:
    """Return the report with what changed since an earlier one of the same model and test set.

    Args:
        report: The run as it is now.
        baseline: The earlier run.
        allow_mismatch: Compare different models or test sets all the same, under a banner.
        name: What to call the baseline, such as its path.

    Raises:
        UsageError: A report is not a run's, or the models or test sets differ.
    """
    for one in (report, baseline):
        _require_run(one)
    notes = mismatches([baseline, report], [name, "this report"])
    if notes and not allow_mismatch:
        raise UsageError(_refusal(notes))
    rows = [_row(report, baseline, figure) for figure in _ROWS]
    compared = {
        "name": name,
        "rows": [r for r in rows if r["before"] is not None or r["now"] is not None],
        "layers": _changed_layers(report, baseline),
        "classes": _changed_classes(report, baseline),
    }
    return {**report, "baseline": compared, "notes": report["notes"] + notes}


def build_comparison(
    reports: Sequence[Report], names: Sequence[str], *, allow_mismatch: bool = False
) -> Report:
    """Arrange several runs side by side, as a report of kind ``"several"``.

    Raises:
        UsageError: There are fewer than two runs, one is not a run's report, or the models or test
            sets differ and that was not allowed.
    """
    if len(reports) < 2:
        raise UsageError("A comparison needs at least two results.")
    for one in reports:
        _require_run(one)
    notes = mismatches(reports, names)
    if notes and not allow_mismatch:
        raise UsageError(_refusal(notes))
    verdicts = [r["verdict"] for r in reports]
    worst = next((v for v in ("failed", "unverified") if v in verdicts), "passed")
    return {
        "format": REPORT_FORMAT,
        "kind": "several",
        "verdict": worst,
        "notes": notes,
        "runs": [{"name": n, **r} for n, r in zip(names, reports, strict=True)],
    }


def mismatches(reports: Sequence[Report], names: Sequence[str]) -> list[str]:
    """Return a sentence for every way in which the runs cannot be compared fairly."""
    found = []
    first = reports[0]["result"]
    for report, name in zip(reports[1:], names[1:], strict=True):
        result = report["result"]
        if _model(first) != _model(result):
            found.append(
                f"{names[0]} and {name} are of different models: {_model_name(first)} and "
                f"{_model_name(result)}."
            )
        found += _test_mismatch(first, result, names[0], name)
    return found


def _test_mismatch(a: dict[str, Any], b: dict[str, Any], name_a: str, name_b: str) -> list[str]:
    one, other = a["test"], b["test"]
    if one is None or other is None:
        if one is other:
            return []
        lacking = name_a if one is None else name_b
        return [f"{lacking} has no test set, so its accuracy is that of its validation images."]
    if one["images"] != other["images"]:
        return [
            f"{name_a} was tested on {one['images']:,} images and {name_b} on "
            f"{other['images']:,}: the test sets differ."
        ]
    if one["classes"] != other["classes"]:
        return [f"The test sets of {name_a} and {name_b} have different classes."]
    if a["test_fingerprint"] != b["test_fingerprint"]:
        return [f"The test sets of {name_a} and {name_b} hold different images or labels."]
    return []


def _model(result: dict[str, Any]) -> tuple[str, str]:
    return result["model"], result["model_fingerprint"] or result["source_sha256"]


def _model_name(result: dict[str, Any]) -> str:
    return f"{result['model']} ({_model(result)[1][:12] or 'no fingerprint'})"


def _refusal(notes: list[str]) -> str:
    return (
        " ".join(notes) + " Such results say nothing about each other; compare results of one "
        "model on one test set, or pass --allow-mismatch to compare them under a banner."
    )


def _require_run(report: Report) -> None:
    if report["kind"] != "run":
        raise UsageError(
            f"A report of kind {report['kind']!r} cannot be compared; give the results of runs."
        )


def _value(report: Report, key: str) -> float | None:
    if key in report["headline"]:
        value = report["headline"][key]
    else:
        metric, _ = end_metric(report)
        value = metric[key] if metric else None
    return None if value is None else float(value)


def _row(report: Report, baseline: Report, figure: _Figure) -> dict[str, Any]:
    key, label, unit = figure.key, figure.label, figure.unit
    before, now = _value(baseline, key), _value(report, key)
    head = report["headline"]
    less_is_better = figure.less_is_better
    if unit == "accuracy":
        unit = "fraction" if head["unit"] == "fraction" else "number"
        label, less_is_better = f"{head['metric']} after compression", head["lower_is_better"]
    elif key == "drop" and head["unit"] != "fraction":
        unit = "number"
    change = None
    if before is not None and now is not None:
        change = (now - before) * (100.0 if unit == "fraction" else 1.0)
    better = None
    if change and (unit != "number" or key != "after" or head["unit"] or less_is_better):
        better = (change < 0) == less_is_better
    return {
        "key": key,
        "label": label,
        "unit": unit,
        "before": before,
        "now": now,
        "change": change,
        "better": better,
    }


def _changed_layers(report: Report, baseline: Report) -> list[dict[str, Any]]:
    earlier = {layer["name"]: layer for layer in baseline["result"]["layers"]}
    changed = []
    for layer in report["result"]["layers"]:
        old = earlier.get(layer["name"])
        if old and any(old[key] != layer[key] for key in _TREATMENT):
            was = {f"{key}_before": old[key] for key in _TREATMENT}
            now = {f"{key}_now": layer[key] for key in _TREATMENT}
            changed.append({"name": layer["name"], **was, **now})
    return changed


# What is done with a layer.
_TREATMENT = ("scheme", "ranks", "width")


def _changed_classes(report: Report, baseline: Report) -> list[dict[str, Any]]:
    """Return the classes whose accuracy after compression changed, worst first."""
    now, before = end_metric(report)[0], end_metric(baseline)[0]
    if not now or not before:
        return []
    earlier = {row["name"]: row["after"] for row in before["per_class"]}
    changed = []
    for row in now["per_class"]:
        old = earlier.get(row["name"])
        if old is not None and row["after"] is not None and old != row["after"]:
            changed.append(
                {
                    "name": row["name"],
                    "before": old,
                    "now": row["after"],
                    "change": 100.0 * (row["after"] - old),
                }
            )
    return sorted(changed, key=lambda c: float(c["change"]))
