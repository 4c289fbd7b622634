"""From a result to the report's plain data: nothing is measured here, only arranged.

A report is a dictionary as written to ``report.json``; its schema is `compress.report.schema`.
"""

from __future__ import annotations

from typing import Any

from compress.config import TORCH
from compress.plan import DENSE
from compress.report import text
from compress.result import GateResult, Result, to_dict

REPORT_FORMAT = 1

Report = dict[str, Any]


def build_report(result: Result) -> Report:
    """Arrange a run's result as a report.

    Returns:
        ``format``, ``kind`` (``"run"``), ``verdict`` (``"passed"``, ``"failed"`` or
        ``"unverified"``), ``headline`` (the few numbers of the summary), ``gates``, ``notes``
        (banners), ``baseline`` (None until `compare_with_baseline`) and ``result``.
    """
    plain = to_dict(result)
    gates = plain["gates"]
    return {
        "format": REPORT_FORMAT,
        "kind": "run",
        "verdict": verdict(gates, tested=plain["test"] is not None),
        "headline": headline(plain),
        "gates": gates,
        "notes": [],
        "baseline": None,
        "result": plain,
    }


def verdict(gates: list[dict[str, Any]], *, tested: bool) -> str:
    """``"failed"`` if any limit broke, else whether a test set vouches for the result."""
    if not all(g["passed"] for g in gates):
        return "failed"
    return "passed" if tested else "unverified"


def with_gates(report: Report, gates: list[GateResult]) -> Report:
    """Return the report with further limits added to it and the verdict brought up to date."""
    every = report["gates"] + [to_dict(g) for g in gates]
    tested = report["result"]["test"] is not None
    return {**report, "gates": every, "verdict": verdict(every, tested=tested)}


def with_notes(report: Report, notes: list[str]) -> Report:
    """Return the report with banners added, such as that two test sets differ."""
    return {**report, "notes": report["notes"] + notes}


def end_metric(report: Report) -> tuple[dict[str, Any] | None, str]:
    """Return the end metric that the report speaks of and its set: test, else validation."""
    result = report["result"]
    if result["test"] is not None:
        return result["test"], "test"
    return result["validation"], "validation"


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """Pick the few numbers of the summary from a result as plain data."""
    metric = result["test"] or result["validation"]
    where = "test" if result["test"] else "validation" if metric else None
    cost = result["cost"]
    latency = cost["latency"][0] if cost["latency"] else None
    rewritten = sum(layer["scheme"] != DENSE for layer in result["layers"])
    custom = metric["custom"] if metric else None
    interval = metric["drop_interval"] if metric else None
    return {
        "set": where,
        "images": metric["images"] if metric else None,
        "metric": custom["name"] if custom else "accuracy",
        "unit": custom["unit"] if custom else "fraction",
        "lower_is_better": custom["lower_is_better"] if custom else False,
        "before": (custom["before"] if custom else metric["top1_before"]) if metric else None,
        "after": (custom["after"] if custom else metric["top1_after"]) if metric else None,
        "drop": metric["drop"] if metric else None,
        "drop_low": interval["low"] if interval else None,
        "drop_high": interval["high"] if interval else None,
        "macs_ratio": _ratio(cost, "macs"),
        "params_ratio": _ratio(cost, "params"),
        "bytes_ratio": _ratio(cost, "bytes"),
        "latency_ratio": latency["ratio"] if latency else None,
        "latency_batch": latency["batch_size"] if latency else None,
        "rewritten": rewritten,
        "kept": len(result["layers"]) - rewritten,
    }


def _ratio(cost: dict[str, Any], key: str) -> float | None:
    folded, compressed = cost["folded"], cost["compressed"]
    if not folded or not compressed or not folded[key]:
        return None
    return float(compressed[key] / folded[key])


def accuracy_sentence(report: Report) -> str:
    """Say what happened to the end metric, with the interval and what it means."""
    head = report["headline"]
    metric, where = end_metric(report)
    if metric is None:
        return "The end metric was not measured."
    on = f"on {text.plural(head['images'], f'{where} image')}"
    if head["before"] is None or head["after"] is None:
        if metric["agreement"] is None:
            return f"Outputs differ {on} by a relative squared error of {_errors(metric)}."
        same = text.percent(metric["agreement"])
        return f"Both networks agree on {same} {on}; without labels accuracy is unknown."
    if metric["custom"]:
        return _measure_sentence(head, on)
    before, after = text.percent(head["before"]), text.percent(head["after"])
    low, high = -head["drop_high"], -head["drop_low"]
    return (
        f"Accuracy {before} → {after} {on}: {text.signed(-head['drop'])} points "
        f"(95% interval {text.signed(low)} to {text.signed(high)}; "
        f"McNemar {text.probability(metric['mcnemar_p'])}). {_meaning(low, high)}"
    )


def _measure_sentence(head: dict[str, Any], on: str) -> str:
    """Say what happened to a measure of a task or of the user's own."""
    unit, sign = head["unit"], 1.0 if head["lower_is_better"] else -1.0
    before, after = (text.measured(head[key], unit) for key in ("before", "after"))
    said = f"{head['metric']} {before} → {after} {on}"
    if head["drop_low"] is None or head["drop_high"] is None:
        return f"{said}{_small_letters(head)}."
    low, high = sorted((sign * head["drop_low"], sign * head["drop_high"]))
    places = 2 if unit else 4
    return (
        f"{said}: {text.change(sign * head['drop'], unit, places)} (95% interval "
        f"{text.signed(low, places)} to {text.signed(high, places)}){_small_letters(head)}. "
        f"{_meaning(-head['drop_high'], -head['drop_low'])}"
    )


def _small_letters(head: dict[str, Any]) -> str:
    return "; lower is better" if head["lower_is_better"] else ""


def _errors(metric: dict[str, Any]) -> str:
    found = [(output["path"], text.number(output["relative_mse"])) for output in metric["outputs"]]
    if len(found) == 1:
        return found[0][1]
    return ", ".join(f"{error} ({path})" for path, error in found)


def _meaning(low: float, high: float) -> str:
    if high < 0:
        return "The loss is more than chance explains."
    if low > 0:
        return "The gain is more than chance explains."
    return "The interval holds zero: chance alone could explain the change."


def cost_sentence(report: Report) -> str:
    """Say what the compressed network costs against the folded original."""
    cost, head = report["result"]["cost"], report["headline"]
    folded, small = cost["folded"], cost["compressed"]
    if not folded or not small:
        return "The cost was not measured."
    parts = [
        f"MACs {text.count(folded['macs'])} → {text.count(small['macs'])} "
        f"({text.ratio(head['macs_ratio'])})",
        f"parameters {text.count(folded['params'])} → {text.count(small['params'])} "
        f"({text.ratio(head['params_ratio'])})",
    ]
    for latency in cost["latency"][:1]:
        parts.append(
            f"latency at batch {latency['batch_size']}{_on_runtime(latency)} "
            f"{text.seconds(latency['dense_seconds'])} → "
            f"{text.seconds(latency['seconds'])} ({text.ratio(latency['ratio'])}, "
            f"{faster(latency['ratio'])})"
        )
    return "; ".join(parts) + "."


def _on_runtime(latency: dict[str, Any]) -> str:
    runtime = latency["runtime"]
    return "" if runtime == TORCH else f" on {text.runtime(runtime)}"


def beside_sentence(report: Report) -> str:
    """Say what the networks take on other runtimes; empty where that is not known."""
    parts = [
        f"{text.runtime(x['runtime'])} at batch {x['batch_size']} "
        f"{text.seconds(x['dense_seconds'])} → {text.seconds(x['seconds'])} "
        f"({text.ratio(x['ratio'])})"
        for x in report["result"]["cost"]["beside"]
    ]
    return f"Beside it: {'; '.join(parts)}." if parts else ""


def timing_sentence(report: Report) -> str:
    """Say how thoroughly times were taken, and what was not timed; empty where it is unknown."""
    result = report["result"]
    cost = result["cost"]
    if not cost["latency"]:
        return "Times were not measured (--no-latency)." if switched_off(report) else ""
    rounds = [
        f"{text.plural(row['runs'], 'round')} at batch {row['batch_size']}"
        for row in cost["latency"]
        if row["runs"] is not None
    ]
    said = [f"Timed in {' and '.join(rounds)}."] if rounds else []
    said += [
        f"Batches of {batch} were not timed: one round would have taken longer than timing may."
        for batch in cost["too_slow"]
    ]
    return " ".join(said)


def switched_off(report: Report) -> bool:
    """Whether times were left out on request."""
    return report["result"]["config"].get("no_latency") is True


def faster(value: float) -> str:
    """Say in a word whether a latency ratio is a gain."""
    if value < 0.97:
        return "faster"
    return "slower" if value > 1.03 else "about the same"


def layers_sentence(report: Report) -> str:
    """Say how many layers were rewritten and by which rule."""
    head, result = report["headline"], report["result"]
    total = head["rewritten"] + head["kept"]
    narrow = sum(bool(layer["width"]) for layer in result["layers"])
    fewer = f", {narrow:,} of them with fewer channels" if narrow else ""
    rule = ""
    if result["rule"]:
        value = "" if result["value"] is None else f" {text.number(result['value'], 6)}"
        rule = f" Rule: {result['rule'].replace('_', ' ')}{value}."
    return f"{head['rewritten']} of {text.plural(total, 'layer')} rewritten{fewer}.{rule}"


def refit_sentence(report: Report) -> str:
    """Say how layers were refitted and how many changed, or why not; empty where it is unknown."""
    result = report["result"]
    path, reason = result["refit_path"], result["refit_reason"]
    if path not in ("graph", "modules"):
        return f"Not refitted: {reason}." if reason else ""
    changed = sum(layer["refitted"] for layer in result["layers"])
    outcome = f"new weights kept in {text.plural(changed, 'layer')}."
    if path == "graph":
        ways = "Refitted along the graph, layer by layer and then jointly"
        further = (result["split"] or {}).get("further_images", 0)  # older reports do not say
        if further:
            ways += f" with {text.plural(further, 'further image')}"
        return f"{ways}; {reason}: {outcome}" if reason else f"{ways}: {outcome}"
    return f"Refitted layer by layer only, since {reason or 'there is no graph'}: {outcome}"


def recovery_sentence(report: Report) -> str:
    """Say what the network learned from the original; empty where it did not try."""
    found = report["result"]["recovery"]
    if found is None:
        return ""
    images = text.plural(found["held_out_images"], "held-out image")
    start, best = (text.number(found[key], 3) for key in ("start", "best"))
    steps = text.plural(found["steps"], "step")
    if not found["best"] < found["start"]:
        return (
            f"Recovery: in {steps} nothing brought the outputs on {images} nearer to the "
            f"original's than they were ({start}), so that the weights are as they were."
        )
    value, unit = found["before"], report["headline"]["unit"]
    before = "" if value is None else f", {text.measured(value, unit)} on the test images before it"
    return (
        f"Recovered in {steps} on {text.plural(found['images'], 'image')} without labels: the "
        f"distance from the original's outputs on {images} fell from {start} to {best}{before}."
    )


def recovery_caption(found: Report) -> str:
    """Say how a network learned, under the plot of its distance from the original."""
    pasted = found["augmentation"] == "pasted"
    pictures = "mirrored, shifted and pasted into each other" if pasted else "as they are"
    said = [
        f"How far the outputs on {text.plural(found['held_out_images'], 'held-out image')} were "
        "from the original's, at every look.",
        f"Steps of {text.number(found['rate'])} of each weight's size, "
        f"{text.plural(found['batch_size'], 'image')} each; pictures {pictures}.",
    ]
    if found["features"]:
        blocks = text.plural(len(found["features"]), "block")
        said.append(f"What {blocks} on the way gave was matched too.")
    if found["precision"] == "mixed":
        said.append("Both networks computed in mixed precision.")
    return " ".join(said)


def verdict_text(report: Report) -> str:
    """The badge's words."""
    gates = report["gates"]
    if report["verdict"] == "failed":
        broken = sum(not g["passed"] for g in gates)
        return f"Failed: {broken} of {text.plural(len(gates), 'limit')} broken"
    if report["verdict"] == "unverified":
        return "Unverified: no test set"
    if not gates:
        return "Verified, no limits set"
    return f"Passed: {text.plural(len(gates), 'limit')} kept"
