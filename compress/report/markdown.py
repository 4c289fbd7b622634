"""Reports as Markdown that fits a pull request: the verdict first, long tables folded away."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from compress.plan import DENSE
from compress.report import deployed, points, progressive, text
from compress.report.build import (
    Report,
    accuracy_sentence,
    beside_sentence,
    cost_sentence,
    end_metric,
    layers_sentence,
    recovery_sentence,
    refit_sentence,
    timing_sentence,
    verdict_text,
)
from compress.report.gates import gate_sentence
from compress.report.rows import baseline_rows, metric_rows, recovery_rows, worst_first
from compress.result import GateResult
from compress.untrusted import visible

_MARKS = {"passed": "✅", "failed": "❌", "unverified": "⚠️"}
_SPECIAL = re.compile(r"([\\`*_\[\]|~#])")
_CLASSES, _FLIPS = 10, 20


def render_markdown(report: Report) -> str:
    """Return a report of any kind as GitHub-flavoured Markdown.

    Names from outside (classes, layers, files) are escaped: neither HTML nor Markdown in them is
    rendered.
    """
    lines = _run(report) if report["kind"] == "run" else _points(report)
    return "\n".join(lines) + "\n"


def escape(value: Any) -> str:
    """Return text from outside so that Markdown shows it as it is, on one line."""
    line = visible(" ".join(str(value).split()))
    return _SPECIAL.sub(r"\\\1", html.escape(line, quote=False))


def _run(report: Report) -> list[str]:
    result = report["result"]
    mark = _MARKS[report["verdict"]]
    lines = [f"## {mark} {verdict_text(report)}: {escape(result['model'])}", ""]
    lines += _banners([*report["notes"], *result["warnings"]])
    lines += [f"**{escape(accuracy_sentence(report))}**", ""]
    costs = (cost_sentence(report), beside_sentence(report), timing_sentence(report))
    lines += [escape(" ".join(sentence for sentence in costs if sentence)), ""]
    said = (layers_sentence(report), refit_sentence(report), recovery_sentence(report))
    lines += [escape(" ".join(sentence for sentence in said if sentence)), ""]
    if report["gates"]:
        lines += ["### Limits", ""]
        lines += [
            f"- {'✅' if g['passed'] else '❌'} {escape(gate_sentence(GateResult(**g)))}"
            for g in report["gates"]
        ]
        lines.append("")
    if report["baseline"]:
        lines += _baseline(report["baseline"])
    metric, where = end_metric(report)
    if metric:
        change = "change" if metric["custom"] else "points"
        lines += [f"### Before and after, {where} images", ""]
        lines += _table(("", "before", "after", change), metric_rows(metric))
        lines += _classes(metric) + _flips(metric)
    return lines + _layers(result) + _curve(report) + _recovery(result) + _provenance(result)


def _recovery(result: dict[str, Any]) -> list[str]:
    found = result["recovery"]
    if found is None:
        return []
    return _folded("Recovery, step by step", _table(("step", "distance"), recovery_rows(found)))


def _banners(notes: Iterable[str]) -> list[str]:
    lines = []
    for note in notes:
        lines += ["> [!WARNING]", f"> {escape(note)}", ""]
    return lines


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join([" --- "] + [" ---: "] * (len(head) - 1)) + "|",
    ]
    lines += ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows]
    return [*lines, ""]


def _folded(summary: str, lines: list[str]) -> list[str]:
    return [f"<details><summary>{escape(summary)}</summary>", "", *lines, "</details>", ""]


def _baseline(baseline: dict[str, Any]) -> list[str]:
    lines = [f"### Since {escape(baseline['name'])}", ""]
    lines += _table(("", "baseline", "now", "change"), baseline_rows(baseline))
    for row in baseline["layers"]:
        was = text.treatment(row["scheme_before"], row["ranks_before"], row["width_before"])
        now = text.treatment(row["scheme_now"], row["ranks_now"], row["width_now"])
        lines.append(f"- {escape(row['name'])}: {escape(was)} → {escape(now)}")
    return lines + ([""] if baseline["layers"] else [])


def _classes(metric: dict[str, Any]) -> list[str]:
    rows = worst_first(metric)
    if not rows:
        return []
    shown = [
        (
            row["name"],
            text.whole(row["images"]),
            text.percent(row["before"], 1),
            text.percent(row["after"], 1),
            text.signed(row["change"], 1),
        )
        for row in rows[:_CLASSES]
    ]
    summary = f"Classes, worst change first ({min(len(rows), _CLASSES)} of {len(rows)})"
    return _folded(summary, _table(("class", "images", "before", "after", "points"), shown))


def _flips(metric: dict[str, Any]) -> list[str]:
    if not metric["to_wrong"]:
        return []
    names = metric["classes"]
    rows = [
        (
            flip["name"] or f"image {flip['index']}",
            names[flip["label"]],
            f"{names[flip['before']]} {text.percent(flip['confidence_before'], 0)}",
            f"{names[flip['after']]} {text.percent(flip['confidence_after'], 0)}",
        )
        for flip in metric["to_wrong"][:_FLIPS]
    ]
    summary = (
        f"Images that went wrong ({len(rows)} of {metric['to_wrong_count']}; "
        f"{metric['to_right_count']} came right)"
    )
    return _folded(summary, _table(("image", "label", "before", "after"), rows))


def _layers(result: dict[str, Any]) -> list[str]:
    rows = []
    for layer in result["layers"]:
        in_place = layer["errors"]["validation_in_place"]
        rewritten = layer["scheme"] != DENSE
        rows.append(
            (
                layer["name"],
                layer["shape"],
                layer["scheme"].replace("_", "-") if rewritten else "kept",
                text.sizes(layer) if rewritten else text.UNKNOWN,
                f"{text.count(layer['dense_macs'])} → {text.count(layer['macs'])}",
                text.number(layer["predicted_relative_mse"]),
                text.number(in_place["relative_mse"] if in_place else None),
                text.why(layer),
            )
        )
    size = text.sizes_heading(result["layers"])
    head = ("layer", "shape", "scheme", size, "MACs", "predicted", "measured", "why")
    note = "Relative mean squared error: predicted, and measured in place on validation images."
    return _folded(f"Layers ({len(rows)})", [note, "", *_table(head, rows)]) if rows else []


def _curve(report: Report) -> list[str]:
    rows = progressive.shown_rows(report)
    if not rows:
        return []
    lines = [escape(progressive.curve_sentence(report)), "", *_table(progressive.HEAD, rows)]
    return _folded(f"Layer by layer ({len(rows) - 1})", lines)


def _provenance(result: dict[str, Any]) -> list[str]:
    versions = result["versions"]
    source = f", source {escape(result['source_sha256'][:12])}" if result["source_sha256"] else ""
    return [
        f"<sub>compress {escape(versions['compress'])}, torch {escape(versions['torch'])}, "
        f"{text.plural(result['calibration_images'], 'calibration image')}{source}</sub>"
    ]


def _points(report: Report) -> list[str]:
    rows = points.points(report)
    sweep = report["kind"] == "sweep"
    what = f"Sweep of {report['sweep']['model']}" if sweep else "Results side by side"
    lines = [f"## {escape(what)}", "", *_banners(report["notes"])]
    if sweep:
        lines += _banners(report["sweep"]["warnings"])
    _, change = points.measured_as(rows)
    head = ("", "MACs", "ratio", "parameters", "before", "after", change, "95% interval", "")
    shown = [
        (
            row["label"],
            text.count(row["macs"]),
            text.ratio(row["macs_ratio"]),
            text.count(row["params"]),
            points.shown(row, "before"),
            points.shown(row, "after"),
            text.signed(row["change"]),
            points.interval(row),
            points.marks(row),
        )
        for row in rows
    ]
    lines += _table(head, shown)
    if sweep and report["sweep"]["deployed"]:
        lines += ["### As files, in float and in eight bits", ""]
        lines += [escape(" ".join(deployed.sentences(report))), ""]
        lines += _table(deployed.HEAD, deployed.shown_rows(report))
    names = points.layer_names(rows)
    ranks = [(name, *(points.treatment(row, name) for row in rows)) for name in names]
    if ranks:
        titles = ("layer", *(escape(row["label"]) for row in rows))
        lines += _folded("What each does with every layer", _table(titles, ranks))
    return lines
