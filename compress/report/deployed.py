"""A sweep's networks as files, in float and in eight bits: rows, the answer in words, the plots."""

from __future__ import annotations

from typing import Any

from compress.report import points, text
from compress.report.build import Report

Row = dict[str, Any]

HEAD = ("network", "weights", "time", "size", "before", "after", "points", "test", "front")
_DRAWN = ("label", "kind", "time", "size", "change", "by_time", "by_bytes")
KINDS = ("dense, float", "dense, eight bits", "low rank, float", "low rank, eight bits")


def rows(report: Report) -> list[Row]:
    """Return a row for each file: what it is, what it costs and how good it is.

    ``time`` and ``size`` are shares of the dense network's in float, ``seconds`` and ``bytes`` the
    numbers themselves; measures are those of `compress.report.points.measures` for the validation
    images, and ``test_after`` is what the test set says.
    """
    sweep = report["sweep"]
    dense = sweep["deployed"]
    if not dense:
        return []
    whole = next(each["bytes"] for each in dense if not each["int8"])
    found = [_row("dense", each, whole, compressed=False) for each in dense]
    for point in sweep["points"]:
        label = points.rule_label(point["rule"], point["value"])
        found += [_row(label, each, whole, compressed=True) for each in point["deployed"]]
    return found


def _row(label: str, each: dict[str, Any], whole: int, *, compressed: bool) -> Row:
    on_test = points.measures(each["test"])
    return {
        "label": label,
        "kind": KINDS[2 * compressed + each["int8"]],
        "compressed": compressed,
        "int8": each["int8"],
        "time": each["ratio"],
        "seconds": each["seconds"],
        "size": each["bytes"] / max(whole, 1),
        "bytes": each["bytes"],
        **points.measures(each["validation"]),
        "test_unit": on_test["unit"],
        "test_after": on_test["after"],
        "by_time": each["by_time"],
        "by_bytes": each["by_bytes"],
    }


def shown_rows(report: Report) -> list[tuple[str, ...]]:
    """Return the rows as a reader wants them, under `HEAD`."""
    return [
        (
            row["label"],
            "eight bits" if row["int8"] else "float",
            _with_unit(row["time"], text.seconds(row["seconds"])),
            _with_unit(row["size"], text.size(row["bytes"])),
            points.shown(row, "before"),
            points.shown(row, "after"),
            text.signed(row["change"]),
            text.measured(row["test_after"], row["test_unit"] or ""),
            ", ".join(
                word for word, key in (("time", "by_time"), ("size", "by_bytes")) if row[key]
            ),
        )
        for row in rows(report)
    ]


def _with_unit(share: float | None, number: str) -> str:
    return text.UNKNOWN if share is None else f"{text.ratio(share)} ({number})"


def sentences(report: Report) -> list[str]:
    """Say what eight bits alone come to, and what low rank has against and beside them."""
    found = rows(report)
    alone = next((row for row in found if row["int8"] and not row["compressed"]), None)
    if alone is None:
        return []
    said = [
        f"Eight bits alone come to {_quality(alone)} at {_costs(alone)} of the dense network in "
        "float."
    ]
    in_float = [row for row in found if row["compressed"] and not row["int8"]]
    for key, words in (("time", "as fast"), ("size", "as small")):
        known = [row for row in in_float if row[key] is not None]
        if alone[key] is None or not known:
            continue
        able = [row for row in known if row[key] <= alone[key]]
        if not able:
            least = min(known, key=lambda row: row[key])
            said.append(
                f"No point in float is {words}: the least, {least['label']}, has "
                f"{text.ratio(least[key])} of the {key}."
            )
            continue
        best = max(able, key=_order)
        said.append(f"In float, the best point that is {words}, {best['label']}, comes to "
                    f"{_quality(best)}.")  # fmt: skip
    both = [row for row in found if row["compressed"] and row["int8"]]
    fronts = [row for row in both if row["by_time"] or row["by_bytes"]]
    if fronts:
        best = max(fronts, key=_order)
        said.append(f"Of both together, {best['label']} comes to {_quality(best)} at "
                    f"{_costs(best)}.")  # fmt: skip
    elif both:
        said.append("Both together are never better than one of them alone.")
    return said


def _quality(row: Row) -> str:
    after = points.shown(row, "after")
    if row["change"] is None:
        return after
    return f"{after} ({text.change(row['change'], row['unit'] or '')})"


def _costs(row: Row) -> str:
    size = f"{text.ratio(row['size'])} of the size"
    return size if row["time"] is None else f"{text.ratio(row['time'])} of the time and {size}"


def _order(row: Row) -> float:
    """The better, the larger; whichever way the measure goes."""
    if row["change"] is not None:
        return float(row["change"]) if not row["lower_is_better"] else -float(row["change"])
    return float(row["after"] or 0.0)


def plot_rows(report: Report) -> list[dict[str, Any]]:
    """Return what the plots draw: a point for each file whose change is known."""
    return [
        {
            **{key: row[key] for key in _DRAWN},
            "shown": points.shown(row, "after"),
            "unit": "points" if row["unit"] in (None, "fraction") else row["unit"],
        }
        for row in rows(report)
        if row["change"] is not None
    ]
