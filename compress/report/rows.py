"""The tables that Markdown and HTML share, as rows of text."""

from __future__ import annotations

from typing import Any

from compress.report import text

Row = tuple[str, str, str, str]


def metric_rows(metric: dict[str, Any]) -> list[Row]:
    """Return label, before, after and change of everything known about an end metric."""
    custom = metric["custom"]
    if custom:
        rows = [_measure_row(measure) for measure in (custom, *metric["further"])]
        if metric["agreement"] is not None:
            rows.append(("Same prediction", "", text.percent(metric["agreement"]), ""))
        return rows + output_rows(metric)
    rows = []
    for label, key in (
        ("Top-1 accuracy", "top1"),
        ("Top-5 accuracy", "top5"),
        ("Mean confidence", "confidence"),
        ("Calibration error (ECE)", "ece"),
    ):
        before, after = metric[f"{key}_before"], metric[f"{key}_after"]
        if before is not None and after is not None:
            points = text.signed(100 * (after - before))
            rows.append((label, text.percent(before), text.percent(after), points))
    if metric["agreement"] is not None:
        rows.append(("Same prediction", "", text.percent(metric["agreement"]), ""))
    if metric["mean_kl"] is not None:
        rows.append(("Mean KL divergence", "", f"{text.number(metric['mean_kl'])} nats", ""))
    if metric["to_wrong_count"] is not None:
        rows.append(("Right → wrong", "", text.whole(metric["to_wrong_count"]), ""))
        rows.append(("Wrong → right", "", text.whole(metric["to_right_count"]), ""))
        rows.append(("Wrong → wrong otherwise", "", text.whole(metric["other_flips"]), ""))
    return rows + output_rows(metric)


def _measure_row(measure: dict[str, Any]) -> Row:
    before, after, unit = measure["before"], measure["after"], measure["unit"]
    change = None if before is None or after is None else after - before
    if change is not None and unit == "fraction":
        change *= 100.0
    name = f"{measure['name']} (lower is better)" if measure["lower_is_better"] else measure["name"]
    shown = [text.measured(value, unit) for value in (before, after)]
    return name, shown[0], shown[1], text.change(change, unit, 2 if unit else 4)


def output_rows(metric: dict[str, Any]) -> list[Row]:
    """Return how each output changed; nothing where accuracy says it of the only one there is."""
    outputs = metric["outputs"]
    if len(outputs) == 1 and metric["top1_before"] is not None:
        return []
    rows = []
    for output in outputs:
        name = f"Output {output['path']}" if output["path"] else "Output"
        error = text.number(output["relative_mse"])
        rows.append((f"{name}, relative squared error", "", error, ""))
        if len(outputs) > 1 and output["agreement"] is not None:
            rows.append((f"{name}, same prediction", "", text.percent(output["agreement"]), ""))
    return rows


def baseline_rows(baseline: dict[str, Any]) -> list[Row]:
    """Return label, baseline, now and change of a comparison with an earlier report."""
    rows = []
    for row in baseline["rows"]:
        unit = row["unit"]
        change = text.signed(row["change"], 4 if unit == "number" else 2)
        if row["change"] is not None and unit in ("fraction", "points"):
            change += " points"
        if row["better"] is not None:
            change += " (better)" if row["better"] else " (worse)"
        rows.append((row["label"], _show(row["before"], unit), _show(row["now"], unit), change))
    return rows


def _show(value: float | None, unit: str) -> str:
    if value is None:
        return text.UNKNOWN
    if unit == "fraction":
        return text.percent(value)
    if unit == "points":
        return f"{value:.2f} points".replace("-", text.MINUS)
    return text.ratio(value) if unit == "ratio" else text.number(value)


def worst_first(metric: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of classes, greatest loss first; classes without an image come last."""

    def order(row: dict[str, Any]) -> tuple[bool, float, str]:
        return row["change"] is None, row["change"] or 0.0, row["name"]

    return sorted(metric["per_class"], key=order)


def recovery_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return every look at the held-out images: the step, and their distance; the best marked."""
    return [
        (
            text.whole(check["step"]),
            text.number(check["distance"], 4)
            + (" (kept)" if check["step"] == found["best_step"] else ""),
        )
        for check in found["checks"]
    ]
