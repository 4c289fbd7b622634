"""The curve over layers of a run with ``--progressive``: its sentence, its rows, its plot."""

from __future__ import annotations

from typing import Any

from compress.report import text
from compress.report.build import Report

HEAD = ("replaced up to", "value", "change", "in all")


def curve_rows(report: Report) -> list[dict[str, Any]]:
    """Return a row for each point: its layer, its value, what changed by it and in all.

    Changes are in points of a fraction, else in the measure's own unit; None where a value is.
    """
    curve = report["result"]["progressive"]
    if not curve:
        return []
    scale = 100.0 if curve["unit"] == "fraction" else 1.0
    rows: list[dict[str, Any]] = []
    for index, point in enumerate(curve["points"]):
        before = rows[-1]["value"] if rows else None
        value = point["value"]
        rows.append(
            {
                "index": index,
                "layer": (point["layer"] or "(the model itself)") if index else "none",
                "value": value,
                "change": _change(before, value, scale),
                "total": _change(rows[0]["value"], value, scale) if rows else None,
            }
        )
    return rows


def _change(before: float | None, after: float | None, scale: float) -> float | None:
    return None if before is None or after is None else scale * (after - before)


def shown_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """Return the rows as a reader wants them, under `HEAD`."""
    rows = curve_rows(report)
    unit = report["result"]["progressive"]["unit"] if rows else ""
    return [
        (
            row["layer"],
            text.measured(row["value"], unit),
            _shown(row["change"], unit),
            _shown(row["total"], unit),
        )
        for row in rows
    ]


def _shown(change: float | None, unit: str) -> str:
    return text.change(change, unit, 2 if unit else 4)


def curve_sentence(report: Report) -> str:
    """Say with which layer most is lost; empty where there is no curve."""
    rows = [row for row in curve_rows(report) if row["change"] is not None]
    if not rows:
        return ""
    curve = report["result"]["progressive"]
    unit, sign = curve["unit"], 1 if curve["lower_is_better"] else -1
    worst = max(rows, key=lambda row: sign * row["change"])
    said = (
        f"Replacing layer by layer takes {curve['metric']} from "
        f"{text.measured(curve['points'][0]['value'], unit)} to "
        f"{text.measured(curve['points'][-1]['value'], unit)} on "
        f"{text.plural(curve['images'], curve['set'] + ' image')}"
    )
    if sign * worst["change"] <= 0:
        return f"{said}, and no layer takes any away."
    return f"{said}; most is lost with {worst['layer']} ({_shown(worst['change'], unit)})."
