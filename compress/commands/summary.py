"""A run's report as the terminal shows it; everything in it is read from the report's data."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from compress.commands.terminal import shortened, table
from compress.plan import DENSE
from compress.report import gate_sentence, text
from compress.report.build import (
    Report,
    accuracy_sentence,
    layers_sentence,
    recovery_sentence,
    refit_sentence,
    timing_sentence,
    verdict_text,
)
from compress.report.progressive import curve_sentence
from compress.result import GateResult

# Reasons for keeping layers that are listed before the rest is left to the report.
MOST_REASONS = 8


def run_summary(
    report: Report, where: str = "", measured_on: str = "held-out validation images"
) -> list[str]:
    """Return the lines of a run's summary.

    Args:
        report: A report of kind ``"run"``.
        where: The result folder.
        measured_on: The images that layers' errors were measured on.
    """
    result = report["result"]
    lines = [f"{verdict_text(report)}: {result['model'] or 'model'}", ""]
    lines += _layers(result["layers"], measured_on) + _totals(report)
    said = (
        layers_sentence(report), refit_sentence(report), recovery_sentence(report),
        accuracy_sentence(report), curve_sentence(report),
        _read_as(result), timing_sentence(report),
    )  # fmt: skip
    lines += [sentence for sentence in said if sentence]
    for gate in report["gates"]:
        lines.append(
            f"Limit {'kept' if gate['passed'] else 'broken'}: {gate_sentence(GateResult(**gate))}"
        )
    lines += [f"Warning: {warning}" for warning in [*report["notes"], *result["warnings"]]]
    if where:
        lines += ["", f"Result: {where}"]
    return lines


def _read_as(result: dict[str, Any]) -> str:
    """Say what the outputs were taken for, unless it is the usual classifier with one output."""
    metric = result["test"] or result["validation"]
    usual = metric and metric["top1_before"] is not None and len(metric["outputs"]) == 1
    return "" if usual or not result["outputs"] else f"Read as {result['outputs']}."


def _layers(layers: list[dict[str, Any]], measured_on: str) -> list[str]:
    rewritten = [layer for layer in layers if layer["scheme"] != DENSE]
    lines = []
    if rewritten:
        size = text.sizes_heading(layers)
        head = ("layer", "shape", "scheme", size, "MACs", "predicted", "measured")
        lines += table(head, map(_layer, rewritten), left=3)
        lines += [f"(relative mean squared error, measured on {measured_on})", ""]
    kept: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        if layer["scheme"] == DENSE:
            kept[text.why(layer)].append(layer["name"] or "(the model itself)")
    lines += [
        f"Kept {shortened(names)}: {reason}" for reason, names in list(kept.items())[:MOST_REASONS]
    ]
    if len(kept) > MOST_REASONS:
        rest = sum(len(names) for names in list(kept.values())[MOST_REASONS:])
        lines.append(f"Kept {text.plural(rest, 'more layer')}; the report gives each reason.")
    return [*lines, ""] if kept else lines


def _layer(layer: dict[str, Any]) -> tuple[str, ...]:
    errors = layer["errors"]
    measured = errors["validation_alone"] or errors["fit_alone"]
    return (
        layer["name"] or "(model)",
        layer["shape"],
        layer["scheme"],
        text.sizes(layer),
        f"{text.count(layer['dense_macs'])} → {text.count(layer['macs'])}",
        text.number(layer["predicted_relative_mse"]),
        text.number(measured["relative_mse"] if measured else None),
    )


def _on_runtime(cost: dict[str, Any], latency: dict[str, Any]) -> str:
    """The runtime of a time, where it needs to be said."""
    return f", {text.runtime(latency['runtime'])}" if cost["beside"] else ""


def _totals(report: Report) -> list[str]:
    cost, head = report["result"]["cost"], report["headline"]
    folded, small = cost["folded"], cost["compressed"]
    if not folded or not small:
        return []
    rows = [
        ("MACs", text.count(folded["macs"]), text.count(small["macs"]), head["macs_ratio"]),
        ("parameters", text.whole(folded["params"]), text.whole(small["params"]),
         head["params_ratio"]),
        ("bytes", text.size(folded["bytes"]), text.size(small["bytes"]), head["bytes_ratio"]),
    ]  # fmt: skip
    rows += [
        (f"time, batch {x['batch_size']}{_on_runtime(cost, x)}", text.seconds(x["dense_seconds"]),
         text.seconds(x["seconds"]), x["ratio"])
        for x in (*cost["latency"], *cost["beside"])
    ]  # fmt: skip
    shown = [(name, before, after, text.ratio(ratio)) for name, before, after, ratio in rows]
    return [*table(("", "before", "after", "ratio"), shown), ""]
