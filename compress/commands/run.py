"""``compress run``: the main job."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from compress.commands.options import Settings, configured, example
from compress.commands.terminal import Terminal
from compress.errors import CompressError, GateError

if TYPE_CHECKING:
    from compress.config import RunConfig
    from compress.pipeline.exported import Exported
    from compress.plan import Plan


@click.command(
    epilog=example(
        "compress run resnet18.pth --model torchvision:resnet18 --data imagefolder:train \\",
        "  --test imagefolder:val --threshold 0.01 --max-drop 1 --output smaller",
    )
)
@click.argument("checkpoint", required=False)
@configured(
    "model", "data", "test", "output", "rules", "schemes", "gates", "images", "calibration", "fit",
    "evaluation", "curve", "export", "compute",
)  # fmt: skip
def run(settings: Settings, terminal: Terminal) -> None:
    """Compress CHECKPOINT: calibrate, choose ranks, rewrite, verify, save, report."""
    run_and_show(settings.config(), terminal)


def run_and_show(config: RunConfig, terminal: Terminal, plan: Plan | None = None) -> None:
    """Do the main job and print its summary, also where a gate failed.

    Raises:
        CompressError: As `compress.pipeline.run.run`.
    """
    from compress.commands.export import export_lines
    from compress.commands.summary import run_summary
    from compress.pipeline import run as pipeline
    from compress.pipeline.export import export_result
    from compress.report import read_report

    def show(exported: Exported | None = None) -> None:
        report = read_report(config.output)
        lines = run_summary(report, config.output)
        if exported is None:
            terminal.show(report, lines)
        else:
            terminal.show(
                {**report, "exported": asdict(exported)}, [*lines, "", *export_lines(exported)]
            )

    try:
        pipeline.run(config, plan=plan, track=terminal.track)
    except GateError:
        show()
        raise
    if not config.export:
        show()
        return
    try:
        exported = export_result(config, terminal.track)
    except CompressError:
        show()
        raise
    show(exported)
