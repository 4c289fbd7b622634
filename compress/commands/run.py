"""``compress run``: the main job."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from compress.commands.options import Settings, configured, example
from compress.commands.terminal import Terminal
from compress.errors import GateError

if TYPE_CHECKING:
    from compress.config import RunConfig
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
    "evaluation", "curve", "compute",
)  # fmt: skip
def run(settings: Settings, terminal: Terminal) -> None:
    """Compress CHECKPOINT: calibrate, choose ranks, rewrite, verify, save, report."""
    run_and_show(settings.config(), terminal)


def run_and_show(config: RunConfig, terminal: Terminal, plan: Plan | None = None) -> None:
    """Do the main job and print its summary, also where a gate failed.

    Raises:
        CompressError: As `compress.pipeline.run.run`.
    """
    from compress.commands.summary import run_summary
    from compress.pipeline import run as pipeline
    from compress.report import read_report

    def show() -> None:
        report = read_report(config.output)
        terminal.show(report, run_summary(report, config.output))

    try:
        pipeline.run(config, plan=plan, track=terminal.track)
    except GateError:
        show()
        raise
    show()
