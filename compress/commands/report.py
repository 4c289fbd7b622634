"""``compress report``: what changed and whether it matters, and a gate for CI."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.commands.options import FINITE, Settings, configured, example
from compress.commands.terminal import Terminal, table
from compress.errors import ArtefactError, ConfigError, GateError, UsageError, printable

if TYPE_CHECKING:
    from compress.report.build import Report
    from compress.report.page import Pictures

# Every limit of `compress.report.LIMITS`, with what its flag says. Written out, because importing
# the reports would slow every command's --help.
LIMIT_HELP = {
    "max_drop": "Points that test accuracy may fall.",
    "max_drop_upper": "The same for the upper end of its 95% interval.",
    "max_class_drop": "Points that the worst class may fall.",
    "min_agreement": "Least share of predictions that stay the same.",
    "max_kl": "Mean KL divergence, in nats.",
    "max_ece_rise": "Points that the calibration error may rise.",
    "max_layer_relative_mse": "Relative error of the worst layer, in place.",
    "max_latency_ratio": "Time over the original's, at the slowest measured batch size.",
    "max_macs_ratio": "MACs over the original's.",
    "max_params_ratio": "Parameters over the original's.",
    "max_bytes_ratio": "Size over the original's.",
    "max_regression": "Points that accuracy may be below the --baseline's.",
}


def limit_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for every limit."""
    for name, text in reversed(LIMIT_HELP.items()):
        flag = "--" + name.replace("_", "-")
        command = click.option(flag, type=FINITE, metavar="X", help=f"Limit: {text}")(command)
    return command


@click.command(
    epilog=example(
        "compress report smaller --max-drop 0.5 --max-class-drop 3 --junit report.xml",
        "compress report run-a run-b run-c --output comparison",
        "compress report smaller --baseline last-release/report.json --max-regression 0.2",
        "compress report --before resnet18.pth --model torchvision:resnet18 --after smaller \\",
        "  --test imagefolder:val --output report",
    )
)
@click.argument("results", nargs=-1, metavar="[RESULT]...")
@click.option("--before", metavar="FILE", help="Measure anew: the original's checkpoint.")
@click.option("--after", metavar="RESULT", help="Measure anew: the compressed model.")
@limit_flags
@click.option("--baseline", metavar="FILE", help="An earlier report.json to compare with.")
@click.option(
    "--allow-mismatch",
    is_flag=True,
    help="Compare different models or test sets all the same, under a banner.",
)
@click.option("--junit", metavar="FILE", help="Write the limits as JUnit XML.")
@configured("model", "test", "output", "images", "evaluation", "compute")
def report(settings: Settings, terminal: Terminal, **flags: Any) -> None:
    """Report on finished RESULTs (folders or files of them), or measure a pair anew.

    Exits with 1 if a limit broke, and says which and by how much. What a report does not hold
    (a test set, a latency) keeps no limit.
    """
    limits = _limits(settings, {n: flags.pop(n) for n in LIMIT_HELP if n in flags})
    if settings.given("no_latency") and "max_latency_ratio" in limits:
        raise ConfigError(
            "no_latency and max_latency_ratio contradict each other: what is not measured keeps no "
            "limit. Leave one of them out."
        )
    asked = Asked(**flags)
    _check_places(settings, asked.junit)
    pictures: Pictures | None = None
    if asked.measures:
        reports, pictures = _measure(settings, terminal, asked)
        names = [asked.after]
    else:
        reports, names = _read(asked.results)
    made = _arranged(reports, names, asked, limits)
    _write(made, settings, asked.junit, pictures)
    terminal.show(made, _lines(made, settings.given("output") or ""))
    _judge(made)


class Asked:
    """What a report is asked for: of finished results, or of a pair to be measured.

    Args:
        results: Finished results.
        before: The original's checkpoint.
        after: The compressed model.
        **flags: ``baseline`` and ``junit`` (files or None), and ``allow_mismatch``.

    Raises:
        UsageError: Both or neither are asked for, or half of a pair.
    """

    def __init__(
        self, results: Sequence[str], before: str | None, after: str | None, **flags: Any
    ) -> None:
        self.results, self.before, self.after = results, before or "", after or ""
        self.baseline: str | None = flags["baseline"]
        self.junit: str | None = flags["junit"]
        self.allow_mismatch: bool = flags["allow_mismatch"]
        self.measures = bool(before or after)
        if results and self.measures:
            raise UsageError("Give finished results, or --before and --after to measure; not both.")
        if self.measures and not (before and after):
            raise UsageError(
                f"{'--after' if before else '--before'} is missing: --before takes the original's "
                "checkpoint, --after the result."
            )
        if not results and not self.measures:
            raise UsageError(
                "Nothing to report on: pass result folders, or --before CKPT --model SPEC --after "
                "RESULT --test SPEC to measure anew."
            )


def _measure(
    settings: Settings, terminal: Terminal, asked: Asked
) -> tuple[list[Report], Pictures | None]:
    """Measure original and result on the test set, with pictures of what changed."""
    from compress.artefact.manifest import read_manifest, recorded_settings
    from compress.pipeline.folder import pictures_of
    from compress.pipeline.verify import verify_result
    from compress.report import build_report

    manifest = read_manifest(asked.after)
    recorded = {k: v for k, v in recorded_settings(manifest).items() if k not in LIMIT_HELP}
    config = settings.config(**recorded, checkpoint=asked.before)
    found = verify_result(config, asked.after, trust_code=settings.trust_code, track=terminal.track)
    return [build_report(found.result)], pictures_of(found.result, found.pair, found.test)


def _read(results: Sequence[str]) -> tuple[list[Report], list[str]]:
    from compress.report import read_report

    names = [str(Path(r).parent if Path(r).suffix else Path(r)) for r in results]
    if len(set(names)) < len(names):
        names = list(results)
    return [read_report(result) for result in results], [printable(name) for name in names]


def _limits(settings: Settings, flags: Mapping[str, float | None]) -> dict[str, float]:
    """The limits asked for; those that are settings of a run may stand in --config as well."""
    asked = {name: settings.given(name) for name in LIMIT_HELP} | {
        name: value for name, value in flags.items() if value is not None
    }
    found = {name: value for name, value in asked.items() if value is not None}
    for name, value in found.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ConfigError(f"{name} = {value!r} is not a finite number.")
    return {name: float(value) for name, value in found.items()}


def _arranged(
    reports: list[Report], names: Sequence[str], asked: Asked, limits: Mapping[str, float]
) -> Report:
    """Hold the reports to limits and to a baseline; several become one comparison."""
    from compress.report import (
        build_comparison,
        check_gates,
        compare_with_baseline,
        read_report,
        with_gates,
    )

    baseline = asked.baseline
    if len(reports) > 1 and baseline:
        raise UsageError("--baseline compares one result; give one, or compare them side by side.")
    if limits or baseline:
        for made, name in zip(reports, names, strict=True):
            _require_run(made, name)
    if baseline:
        earlier = read_report(baseline)
        reports = [
            compare_with_baseline(
                reports[0], earlier, allow_mismatch=asked.allow_mismatch, name=printable(baseline)
            )
        ]
    if limits:
        reports = [with_gates(_without(r, limits), check_gates(r, limits)) for r in reports]
    if len(reports) == 1:
        return reports[0]
    return build_comparison(reports, names, allow_mismatch=asked.allow_mismatch)


def _require_run(made: Report, name: str) -> None:
    if made["kind"] != "run":
        chosen = " (that of a sweep is in its folder 'chosen')" if made["kind"] == "sweep" else ""
        raise UsageError(
            f"{name} is a report of kind {made['kind']!r}, which limits and baselines are not "
            f"for; pass the result of a run{chosen}."
        )


def _without(made: Report, limits: Mapping[str, float]) -> Report:
    """Drop the run's own limits that are given anew, so that none stands there twice."""
    return {**made, "gates": [g for g in made["gates"] if g["name"] not in limits]}


def _write(made: Report, settings: Settings, junit: str | None, pictures: Pictures | None) -> None:
    from compress.files import atomic_update, write_atomically
    from compress.report import render_junit, write_report

    if junit:
        if made["kind"] == "sweep":
            raise UsageError("--junit writes limits, and a sweep has none; pass its chosen result.")
        write_atomically(junit, render_junit(made))
    output = settings.given("output")
    if not output:
        return
    with atomic_update(output) as folder:  # perhaps the result's own: what else is in it stays
        write_report(made, folder, pictures)


def _check_places(settings: Settings, junit: str | None) -> None:
    """Refuse what cannot or must not be written, before anything is measured.

    Raises:
        ArtefactError: The output folder or the JUnit file is such a thing.
    """
    from compress.files import check_file, check_writable

    if junit:
        check_file(junit, "JUnit file")
        _check_junit(Path(junit))
    output = settings.given("output")
    if output:
        _check_report_folder(Path(output), force=bool(settings.given("force")))
        check_writable(output)


def _check_report_folder(folder: Path, *, force: bool) -> None:
    """Refuse a folder that is somebody's, or that holds a report already.

    Raises:
        ArtefactError: It is, and what to do.
    """
    from compress.files import REPORT, RESULT, SWEEP, check_output, kind_of_folder

    if os.path.exists(folder / "report.json") and not force:
        raise ArtefactError(
            f"{folder} already holds a report; pass --force to replace it, or another folder."
        )
    check_output(folder, force=True, kind=kind_of_folder(folder, (REPORT, RESULT, SWEEP)))


def _check_junit(path: Path) -> None:
    """Refuse to write over anything but an earlier JUnit file of this command, as CI does.

    Raises:
        ArtefactError: Another file stands there.
    """
    try:
        with open(path, "rb") as file:
            ours = b'<testsuites name="compress report"' in file.read(200)
    except OSError:
        return  # not there, or writing says what is wrong with it
    if not ours:
        raise ArtefactError(
            f"{path} exists and was not written by compress report; pass another file to --junit."
        )


def _lines(made: Report, where: str) -> list[str]:
    from compress.commands.summary import run_summary
    from compress.report import points, text

    if made["kind"] == "run":
        measured_on = "held-out validation images" if made["result"]["split"] else "the test images"
        lines = run_summary(made, where, measured_on)
        baseline = made["baseline"]
        if not baseline:
            return lines
        from compress.report.rows import baseline_rows

        columns = (f"since {baseline['name']}", "baseline", "now", "change")
        return [*lines, "", *table(columns, baseline_rows(baseline))]
    rows = [
        (
            row["label"], row["verdict"] or points.marks(row), text.ratio(row["macs_ratio"]),
            text.whole(row["params"]), points.shown(row, "before"), points.shown(row, "after"),
            text.signed(row["change"]), points.interval(row),
        )
        for row in points.points(made)
    ]  # fmt: skip
    _, change = points.measured_as(points.points(made))
    head = ("", "", "MACs", "parameters", "before", "after", change, "95% interval")
    warnings = [*made["notes"], *(made["sweep"]["warnings"] if made["kind"] == "sweep" else [])]
    lines = [*table(head, rows, left=2), "", *(f"Warning: {w}" for w in warnings)]
    return [*lines, *([f"Report: {where}"] if where else [])]


def _judge(made: Report) -> None:
    """Raise `GateError` with every limit that broke, and by how much."""
    from compress.report import gate_sentence
    from compress.result import GateResult

    runs: list[dict[str, Any]] = made.get("runs", [])
    named = [(f"{run['name']}: ", run) for run in runs] or [("", made)]
    broken = [
        f"{name}{gate_sentence(GateResult(**gate))}."
        for name, run in named
        for gate in run.get("gates", [])
        if not gate["passed"]
    ]
    if broken:
        raise GateError(" ".join(broken))
