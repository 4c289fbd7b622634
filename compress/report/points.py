"""Sweeps, and several runs side by side: both are points of cost against accuracy."""

from __future__ import annotations

import csv
import io
from typing import Any

from compress.plan import DENSE, NARROW, NARROWER
from compress.report import text
from compress.report.build import REPORT_FORMAT, Report, end_metric
from compress.result import SweepResult, to_dict
from compress.untrusted import visible

Point = dict[str, Any]

# What a spreadsheet takes for the beginning of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

_MEASURED = (
    "metric", "unit", "images", "before", "after", "change", "change_low", "change_high",
    "mcnemar_p", "agreement", "mean_kl", "lower_is_better",
)  # fmt: skip

COLUMNS = (
    "label", "rule", "value", "macs", "params", "bytes", "macs_ratio", "metric", "images", "before",
    "after", "change", "change_low", "change_high", "mcnemar_p", "agreement", "mean_kl",
    "test_before", "test_after", "test_change", "pareto", "chosen", "seconds",
)  # fmt: skip

_OF_INT8 = ("after", "change")
# Of points that have files in float and in eight bits; times are over the dense network's in float.
FILE_COLUMNS = (
    "float time", "float bytes", "int8 time", "int8 bytes",
    *(f"int8 {key}" for key in _OF_INT8), "int8 test_after",
)  # fmt: skip


def build_sweep_report(sweep: SweepResult) -> Report:
    """Arrange a sweep as a report of kind ``"sweep"``; passed once its chosen point is tested."""
    tested = any(p.chosen and p.test is not None for p in sweep.points)
    notes = [] if sweep.points else ["No point of this sweep has finished."]
    return {
        "format": REPORT_FORMAT,
        "kind": "sweep",
        "verdict": "passed" if tested else "unverified",
        "notes": notes,
        "sweep": to_dict(sweep),
    }


def points(report: Report) -> list[Point]:
    """Return the points of a sweep's or a comparison's report as rows, see `COLUMNS`.

    Beside the columns a row holds ``ranks``, ``widths`` and ``schemes`` by layer and, for a sweep's
    point that met the test set, the same measures ``on_test``. A change is in points, of
    the validation set for a sweep and of the set that the headline speaks of for a run.
    """
    if report["kind"] == "sweep":
        return [_of_sweep(p) for p in report["sweep"]["points"]]
    return [_of_run(r) for r in report["runs"]]


def layer_names(rows: list[Point]) -> list[str]:
    """Return every layer of any point, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row["schemes"]))


def treatment(row: Point, layer: str) -> str:
    """Say what a point does with a layer: ``"output 12"``, ``"narrow 24→48"``, ``"kept"``."""
    scheme = row["schemes"].get(layer)
    if scheme is None:
        return text.UNKNOWN
    return text.treatment(scheme, row["ranks"].get(layer), row["widths"].get(layer))


def shown(row: Point, key: str) -> str:
    """Write a point's metric: an accuracy or another fraction as percent, else as it is."""
    return text.measured(row[key], row["unit"] or "")


def measured_as(rows: list[Point]) -> tuple[str, str]:
    """Return what all points are measured by, and the word for its changes."""
    names = {row["metric"] for row in rows if row["metric"]}
    units = {row["unit"] for row in rows if row["metric"]}
    name = names.pop() if len(names) == 1 else "accuracy"
    return name, "points" if units <= {"fraction"} else "change"


def interval(row: Point) -> str:
    """Write the interval of a point's change."""
    if row["change_low"] is None:
        return text.UNKNOWN
    return f"{text.signed(row['change_low'])} to {text.signed(row['change_high'])}"


def marks(row: Point) -> str:
    """Say what is special about a point: its verdict, chosen, on the Pareto front."""
    words = [row["verdict"] or "", "chosen" if row["chosen"] else ""]
    words.append("Pareto" if row["pareto"] else "")
    return ", ".join(w for w in words if w)


def rule_label(rule: str, value: float | None) -> str:
    """Name a setting: ``"threshold 0.001"``."""
    shown = "" if value is None else f" {text.number(value, 4)}"
    return f"{rule.replace('_', ' ')}{shown}"


def render_csv(report: Report) -> str:
    """Return the points as CSV: one row a point, then one column of ranks for each layer.

    Between them stand `FILE_COLUMNS`, where points have files in float and in eight bits. Layers
    that any point makes narrower have a column of widths as well, such as ``24x48``.
    """
    rows = points(report)
    layers = layer_names(rows)
    narrow = [name for name in layers if any(name in row["widths"] for row in rows)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = [*(f"rank {name}" for name in layers), *(f"width {name}" for name in narrow)]
    files = [_files(row) for row in rows]
    file_columns = FILE_COLUMNS if any(files) else ()
    writer.writerow([*COLUMNS, *file_columns, *map(_harmless, columns)])
    for row, of_files in zip(rows, files, strict=True):
        ranks = [_times(row["ranks"].get(name)) or _whole(row, name) for name in layers]
        widths = [_times(row["widths"].get(name)) for name in narrow]
        own = [_cell(row[c]) for c in COLUMNS] + [_cell(of_files.get(c)) for c in file_columns]
        writer.writerow(own + ranks + widths)
    return out.getvalue()


def _files(row: Point) -> dict[str, Any]:
    """What a point's files in float and in eight bits cost, and how good the second is."""
    found: dict[str, Any] = {}
    for file in row["files"]:
        name = "int8" if file["int8"] else "float"
        found |= {f"{name} time": file["ratio"], f"{name} bytes": file["bytes"]}
        if file["int8"]:
            on_test = measures(file["test"])
            found |= {f"int8 {key}": measures(file["validation"])[key] for key in _OF_INT8}
            found["int8 test_after"] = on_test["after"]
    return found


def _times(numbers: Any) -> str:
    return "x".join(str(n) for n in numbers or ())


def _whole(row: Point, layer: str) -> str:
    """Say of a layer without ranks whether it is dense or only narrower."""
    scheme = row["schemes"].get(layer)
    if scheme is None:
        return ""
    if layer not in row["widths"]:
        return DENSE
    return scheme if scheme in NARROWER else NARROW


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, str):
        return _harmless(value)
    return str(value).lower() if isinstance(value, bool) else value


def _harmless(text: str) -> str:
    """Return text that a spreadsheet shows and does not run as a formula."""
    text = visible(text)
    return f"'{text}" if text.startswith(_FORMULA) else text


def _of_sweep(point: dict[str, Any]) -> Point:
    test, on_test = point["test"], measures(point["test"])
    return {
        "label": rule_label(point["rule"], point["value"]),
        **{k: point[k] for k in ("rule", "value", "macs", "params", "bytes", "pareto", "chosen")},
        "macs_ratio": point["ratio"],
        **measures(point["validation"]),
        "test_before": on_test["before"],
        "test_after": on_test["after"],
        "test_change": on_test["change"],
        "on_test": on_test if test else None,
        "seconds": point["seconds"],
        "ranks": point["ranks"],
        "widths": point["widths"],
        # A layer with ranks was rewritten, whether or not the sweep recorded the scheme.
        "schemes": point["schemes"]
        | {name: "rank" for name in point["ranks"] if name not in point["schemes"]},
        "verdict": None,
        "latency_ratio": None,
        "files": point["deployed"],
    }


def _of_run(run: dict[str, Any]) -> Point:
    result, head = run["result"], run["headline"]
    cost = result["cost"]["compressed"] or {"macs": None, "params": None, "bytes": None}
    on_test = measures(result["test"])
    return {
        "label": run["name"],
        "rule": result["rule"],
        "value": result["value"],
        **cost,
        "macs_ratio": head["macs_ratio"],
        **measures(end_metric(run)[0]),
        "test_before": on_test["before"],
        "test_after": on_test["after"],
        "test_change": on_test["change"],
        "on_test": None,
        "pareto": False,
        "chosen": False,
        "seconds": sum(result["seconds"].values()) or None,
        "ranks": {layer["name"]: layer["ranks"] for layer in result["layers"]},
        "widths": {x["name"]: x["width"] for x in result["layers"] if x["width"]},
        "schemes": {layer["name"]: layer["scheme"] for layer in result["layers"]},
        "verdict": run["verdict"],
        "latency_ratio": head["latency_ratio"],
        "files": (),
    }


def _ends(metric: dict[str, Any]) -> tuple[float | None, float | None]:
    custom = metric["custom"]
    if custom:
        return custom["before"], custom["after"]
    return metric["top1_before"], metric["top1_after"]


def measures(metric: dict[str, Any] | None) -> Point:
    """Return what an end metric says, under names of its own; None for what it does not."""
    empty: Point = dict.fromkeys(_MEASURED)
    if metric is None:
        return empty
    before, after = _ends(metric)
    custom = metric["custom"]
    sign = 1.0 if custom and custom["lower_is_better"] else -1.0
    found = {
        "metric": custom["name"] if custom else "accuracy",
        "unit": custom["unit"] if custom else "fraction",
        "images": metric["images"],
        "before": before,
        "after": after,
        "change": None if metric["drop"] is None else sign * metric["drop"],
        "mcnemar_p": metric["mcnemar_p"],
        "agreement": metric["agreement"],
        "mean_kl": metric["mean_kl"],
        "lower_is_better": bool(custom and custom["lower_is_better"]),
    }
    interval = metric["drop_interval"]
    if interval:
        low, high = sorted((sign * interval["low"], sign * interval["high"]))
        found |= {"change_low": low, "change_high": high}
    return empty | found
