"""``compress sweep``: a grid of settings on one calibration."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from compress.commands.interruption import INTERRUPTED
from compress.commands.options import Settings, configured, example
from compress.commands.output import say
from compress.commands.terminal import Terminal, table
from compress.errors import ConfigError, GateError
from compress.rules import GRID_RULES, RULE_NAMES

if TYPE_CHECKING:
    from compress.config import RunConfig
    from compress.result import SweepPoint
    from compress.sweep import Grid, Pick

_HEAD = ("point", "MACs", "parameters", "validation", "points", "test", "points", "seconds")
_WIDTHS = (22, 6, 11, 10, 7, 8, 7, 8)


def grid_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for the grid of every rule that a sweep can walk along."""
    for rule in reversed(GRID_RULES):
        if rule.grid is not None:
            flag, name = rule.grid.flag, f"{rule.name}_grid"
            command = click.option(flag, name, metavar="GRID", help=rule.grid.help)(command)
    return command


@click.command(
    epilog=example(
        "compress sweep resnet18.pth --model torchvision:resnet18 --data imagefolder:train \\",
        "  --test imagefolder:val --thresholds 1e-4:1e-1:9 --output sweep",
        "compress sweep ... --macs 0.9,0.8,0.65,0.5 --pick 'drop<=0.5' --resume --output sweep",
    )
)
@click.argument("checkpoint", required=False)
@grid_flags
@click.option(
    "--pick",
    metavar="COND",
    help="Save the point with the fewest MACs for which this "
    "holds on validation images: drop<=0.5, or several with commas (drop, drop_upper, "
    "accuracy, agreement, kl, macs).",
)
@click.option("--resume", is_flag=True, help="Go on with the sweep in --output.")
@click.option(
    "--test-points/--no-test-points",
    default=True,
    help="Measure every point on the test set, or the picked one alone (default: every point).",
)
@click.option(
    "--int8",
    is_flag=True,
    help="Also export every point and the dense network, in float and in eight bits, and compare "
    "all of them by time and size (on --runtime onnxruntime or openvino).",
)
@configured(
    "model", "data", "test", "output", "rules", "schemes", "gates", "images", "calibration", "fit",
    "evaluation", "compute",
)  # fmt: skip
def sweep(settings: Settings, terminal: Terminal, *, pick: str | None, **others: Any) -> None:
    """Measure CHECKPOINT at many thresholds, energies or budgets, and calibrate once.

    Writes a table (sweep.csv), the curve with its Pareto front (report.html) and, with --pick, the
    chosen point as a result folder (OUTPUT/chosen). Finished points survive a stop: --resume takes
    those whose weights, images and settings are the same.
    """
    from compress.sweep import parse_pick

    chosen = parse_pick(pick) if pick is not None else None
    flags = {name: others.pop(name) for name in ("resume", "test_points", "int8")}
    asked = Asked(_grid(others), chosen, **flags)
    sweep_and_show(settings.config(), terminal, asked)


# The rules' own flags take one value; here a grid goes by the same name.
sweep.params = [p for p in sweep.params if p.name not in RULE_NAMES]


@dataclass(frozen=True)
class Asked:
    """What a sweep is asked for, beside its configuration."""

    grid: Grid
    pick: Pick | None = None
    resume: bool = False
    test_points: bool = True
    int8: bool = False


def sweep_and_show(config: RunConfig, terminal: Terminal, asked: Asked) -> None:
    """Sweep, with a line for each point as it finishes and the front at the end.

    Raises:
        CompressError: As `compress.sweep.sweep`.
    """
    from compress import sweep as sweeping
    from compress.report import read_report

    lines = iter([_line(_HEAD)])

    def show(point: SweepPoint, took: str | None = None) -> None:
        if not (terminal.quiet or terminal.as_json):
            for head in lines:  # with the first point, so that an error before it stands alone
                say(head)
            say(_point(point, took))

    options = sweeping.Options(
        asked.test_points, terminal.track, show, lambda point: show(point, "kept"), asked.int8
    )
    try:
        sweeping.sweep(config, asked.grid, pick=asked.pick, resume=asked.resume, options=options)
    except GateError:
        report = read_report(config.output)
        terminal.show(report, _summary(report, config.output))
        raise
    except KeyboardInterrupt:
        say(
            f"Interrupted; finished points are kept in {config.output}. The same command with "
            "--resume goes on from there.",
            err=True,
        )
        sys.exit(INTERRUPTED)
    report = read_report(config.output)
    terminal.show(report, _summary(report, config.output))


def _grid(grids: dict[str, str | None]) -> Grid:
    from compress.sweep import parse_grid

    given = {name.removesuffix("_grid"): text for name, text in grids.items() if text is not None}
    if len(given) != 1:
        flags = [
            rule.grid.flag
            for rule in GRID_RULES
            if rule.grid is not None and (not given or rule.name in given)
        ]
        start = "Several grids were given" if given else "No grid was given"
        raise ConfigError(f"{start}: a sweep takes one of {', '.join(flags)}.")
    ((rule, text),) = given.items()
    return parse_grid(rule, text)


def _point(point: SweepPoint, took: str | None) -> str:
    from compress.report import text

    def change(metric: object) -> str:
        drop, custom = getattr(metric, "drop", None), getattr(metric, "custom", None)
        rising = custom is not None and custom.lower_is_better
        return text.signed(drop if drop is None or rising else -drop)

    def quality(metric: object) -> str:
        custom = getattr(metric, "custom", None)
        if custom is not None:
            return text.measured(custom.after, custom.unit)
        return text.percent(getattr(metric, "top1_after", None))

    return _line(
        (
            f"{point.rule} {text.number(point.value, 4)}",
            text.ratio(point.ratio),
            text.whole(point.params),
            quality(point.validation),
            change(point.validation),
            quality(point.test),
            change(point.test),
            took or text.seconds(point.seconds),
        )
    )


def _line(cells: tuple[str, ...]) -> str:
    first, *rest = zip(cells, _WIDTHS, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])


def _summary(report: dict[str, object], where: str) -> list[str]:
    from compress.report import deployed, points, text

    rows = points.points(report)
    front = sorted((r for r in rows if r["pareto"]), key=lambda r: float(r["macs_ratio"]))
    _, change = points.measured_as(rows)
    head = ("Pareto front", "MACs", "parameters", "validation", change, "95% interval", "")
    shown = [
        (
            r["label"], text.ratio(r["macs_ratio"]), text.whole(r["params"]),
            points.shown(r, "after"), text.signed(r["change"]), points.interval(r),
            "chosen" if r["chosen"] else "",
        )
        for r in front
    ]  # fmt: skip
    sweep = report["sweep"]
    assert isinstance(sweep, dict)
    lines = ["", *table(head, shown), ""]
    files = deployed.shown_rows(report)
    if files:
        lines += [*table(deployed.HEAD, files), *deployed.sentences(report), ""]
    lines += [f"Warning: {warning}" for warning in sweep["warnings"]]
    chosen = next((r for r in rows if r["chosen"]), None)
    if chosen is not None:
        tested = ""
        if chosen["test_after"] is not None:
            tested = f": {text.change(chosen['test_change'], chosen['unit'])} on the test set"
        lines.append(f"Chosen by {sweep['pick']}: {chosen['label']}{tested}; in {where}/chosen")
    return [*lines, f"Sweep: {where} (report.html shows the curve)"]
