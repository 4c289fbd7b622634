"""What the page's plots draw: a small part of the report, thinned where the eye sees no more."""

from __future__ import annotations

import math
from typing import Any

from compress.linalg.schemes import SCHEMES
from compress.plan import DENSE
from compress.report import points, text
from compress.report.build import Report, end_metric
from compress.report.deployed import plot_rows
from compress.report.progressive import curve_rows
from compress.report.rows import worst_first
from compress.rules import rule_named

Data = dict[str, Any]

# A curve of this many points looks the same as one of thousands and keeps the page small.
SPECTRUM_POINTS = 160
CLASSES_DRAWN = 40


def plot_data(report: Report) -> Data:
    """Return the data behind the plots of a page, ready for JSON."""
    if report["kind"] == "run":
        return _run(report)
    rows = points.points(report)
    drawn = [_point(i, row) for i, row in enumerate(rows)]
    files = plot_rows(report) if report["kind"] == "sweep" else []
    return {"kind": "points", "points": drawn, "files": files}


def _run(report: Report) -> Data:
    metric, _ = end_metric(report)
    result = report["result"]
    head = report["headline"]
    limit = next((g["limit"] for g in report["gates"] if g["name"] == "max_drop"), None)
    rule, drop = rule_named(result["rule"]), None
    if head["drop_low"] is not None:
        drop = {"change": -head["drop"], "low": -head["drop_high"], "high": -head["drop_low"]}
        drop["limit"] = None if limit is None else -limit
        drop["unit"] = "points" if head["unit"] == "fraction" else head["unit"]
    return {
        "kind": "run",
        "drop": drop,
        "classes": worst_first(metric)[:CLASSES_DRAWN] if metric else [],
        "bins": _bins(metric) if metric else [],
        "layers": [_layer(layer) for layer in result["layers"]],
        "spectra": [_spectrum(layer) for layer in result["layers"] if layer["eigenvalues"]],
        "threshold": result["value"] if rule and rule.cuts_spectra_at_value else None,
        "correlation": result["rank_correlation"],
        "progressive": _progressive(report),
        "recovery": _looks(result["recovery"]) if result["recovery"] else [],
    }


def _bins(metric: dict[str, Any]) -> list[Data]:
    return [
        {"which": which, **row}
        for which in ("before", "after")
        for row in metric[f"bins_{which}"]
        if row["images"]
    ]


def _layer(layer: dict[str, Any]) -> Data:
    errors = layer["errors"]
    rewritten = layer["scheme"] != DENSE
    full, rank = layer["full_rank"], max(layer["ranks"], default=None)
    return {
        **{k: layer[k] for k in _COPIED},
        "rewritten": rewritten,
        "ranks": text.ranks(layer["ranks"]),
        "width": text.widths(layer["width"]) if layer["width"] else None,
        "rank_share": rank / full if rewritten and rank and full else None,
        "break_even_share": layer["break_even"] / full if layer["break_even"] and full else None,
        "predicted": layer["predicted_relative_mse"] if rewritten else None,
        "alone": _relative(errors["validation_alone"] or errors["fit_alone"]),
        "in_place": _relative(errors["validation_in_place"] or errors["fit_in_place"]),
    }


def _progressive(report: Report) -> Data | None:
    rows = curve_rows(report)
    if not rows:
        return None
    curve = report["result"]["progressive"]
    unit = "points" if curve["unit"] == "fraction" else curve["unit"]
    scale = 100.0 if curve["unit"] == "fraction" else 1.0
    drawn = [{**row, "value": scale * row["value"]} for row in rows if row["value"] is not None]
    return {"metric": curve["metric"], "unit": unit, "rows": drawn}


def _looks(found: dict[str, Any]) -> list[Data]:
    """Every look that a recovery took at the held-out images."""
    return [{**check, "kept": check["step"] == found["best_step"]} for check in found["checks"]]


_COPIED = (
    "name", "shape", "scheme", "full_rank", "break_even", "dense_macs", "macs", "dense_params",
    "params", "predicted_loss", "measured_loss", "dense_seconds", "seconds",
)  # fmt: skip


def _relative(error: dict[str, Any] | None) -> float | None:
    return error["relative_mse"] if error else None


def _spectrum(layer: dict[str, Any]) -> Data:
    """Return a spectrum relative to its largest eigenvalue, thinned evenly in the logarithm."""
    values = layer["eigenvalues"]
    count = layer["eigenvalue_count"] or len(values)
    # A closed form cuts this very spectrum; the ranks of other schemes are of something else.
    of_outputs = layer["scheme"] in [scheme.name for scheme in SCHEMES if scheme.closed_form]
    cut = max(layer["ranks"]) if of_outputs and layer["ranks"] else None
    top = values[0] or 0.0
    kept = {0, len(values) - 1, *((cut - 1,) if cut and cut <= len(values) else ())}
    for i in range(SPECTRUM_POINTS):
        kept.add(round(math.expm1(math.log(len(values)) * i / (SPECTRUM_POINTS - 1))))
    line = [
        [i + 1, float(f"{values[i] / top:.5g}")]
        for i in sorted(kept)
        if top > 0 and i < len(values) and values[i] is not None and values[i] > 0
    ]
    return {"name": layer["name"], "count": count, "cut": cut, "values": line}


def _point(index: int, row: points.Point) -> Data:
    layers = [
        {
            "name": name,
            "ranks": text.ranks(row["ranks"].get(name)),
            "treatment": points.treatment(row, name),
        }
        for name in row["schemes"]
    ]
    return {
        "index": index,
        **{k: row[k] for k in ("label", "macs", "macs_ratio", "params", "pareto", "chosen")},
        **_judged(row),
        "on_test": row["on_test"] and _judged(row["on_test"]),
        "metric": row["metric"] or "accuracy",
        "unit": "points" if row["unit"] in (None, "fraction") else row["unit"],
        "layers": layers,
    }


def _judged(measured: points.Point) -> Data:
    """What one set of images says of a point."""
    change = measured["change"]
    if change is None and None not in (measured["before"], measured["after"]):
        scale = 100.0 if measured["unit"] == "fraction" else 1.0
        change = scale * (measured["after"] - measured["before"])
    return {
        "change": change,
        "low": measured["change_low"],
        "high": measured["change_high"],
        "accuracy": points.shown(measured, "after"),
    }
