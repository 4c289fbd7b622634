"""``compress recover``: a result that learns from its original."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from compress.commands.interruption import INTERRUPTED
from compress.commands.options import FINITE, Settings, configured, example
from compress.commands.output import say
from compress.commands.terminal import Terminal
from compress.errors import ConfigError, GateError

if TYPE_CHECKING:
    from compress.config import RunConfig
    from compress.pipeline.recovery_stage import Wish

# Where neither minutes nor steps are given.
MINUTES = 10.0


@click.command(
    epilog=example(
        "compress recover smaller --checkpoint resnet18.pth --data imagefolder:train \\",
        "  --test imagefolder:val --minutes 10 --output recovered",
    )
)
@click.argument("result", metavar="RESULT")
@click.option("--checkpoint", metavar="FILE", help="The original that was compressed.")
@click.option("--minutes", type=FINITE, metavar="M", help="How long it may take (default 10).")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Take so many steps, of a batch each, however long that takes: the same bytes every time.",
)
@click.option(
    "--overparam",
    type=click.IntRange(min=2),
    metavar="DEPTH",
    help="Train each layer as a chain of so many, which becomes one layer again at the end.",
)
@click.option(
    "--loss-fn",
    "goal",
    metavar="SPEC",
    help="package.module:function (outputs, originals) -> summed loss, in place of the distance "
    "that suits the outputs.",
)
@click.option("--resume", is_flag=True, help="Go on with a recovery that was stopped.")
@configured("model", "data", "test", "output", "gates", "images", "evaluation", "compute")
def recover(
    settings: Settings, terminal: Terminal, *, result: str, resume: bool, **asked: Any
) -> None:
    """Let RESULT learn from its original on images without labels, and save what comes of it.

    Weights change; structure, MACs and layers that were kept do not. A part of the images is held
    out to judge by, and the network that is saved is the best one met there, never worse than at
    the start. Model and preprocessing are those of the run unless you give others.
    """
    from compress.artefact.manifest import read_manifest, recorded_settings
    from compress.commands.summary import run_summary
    from compress.pipeline.recover import Request, recover_result
    from compress.report import build_report, read_report

    manifest = read_manifest(result)
    drawn = {n: v for n, v in manifest.settings.items() if n in ("seed", "calibration_images")}
    config = settings.config(**recorded_settings(manifest), **drawn)
    request = Request(result, _wish(**asked), resume, settings.trust_code)
    try:
        found = recover_result(config, request, terminal.track)
    except GateError:
        report = read_report(config.output)
        terminal.show(report, run_summary(report, config.output))
        raise
    except KeyboardInterrupt:
        _say_interrupted(config)
        raise
    terminal.show(build_report(found), run_summary(build_report(found), config.output))


def _wish(
    *,
    minutes: float | None,
    steps: int | None,
    overparam: int | None,
    goal: str | None,
) -> Wish:
    """What the command's own flags ask for.

    Raises:
        ConfigError: They contradict each other, or leave no time.
    """
    from compress.pipeline.recovery_stage import Wish

    if minutes is not None and steps is not None:
        raise ConfigError("Both --minutes and --steps were given; give one of them.")
    if minutes is not None and minutes <= 0:
        raise ConfigError(f"minutes = {minutes:g} leaves no time to learn; give more than 0.")
    length = None if steps is not None else (minutes or MINUTES)
    return Wish(length, steps, overparam or 0, goal or "")


def _say_interrupted(config: RunConfig) -> None:
    """Say where a stopped recovery goes on, and end, if there is anything to go on from."""
    from compress.files import RECOVERY_FILE
    from compress.pipeline.unfinished import unfinished_folder

    folder = unfinished_folder(config.output)
    if not (folder / RECOVERY_FILE).is_file():
        return
    say(
        f"Interrupted; the best network so far is in {folder}. The same command with --resume "
        "goes on from there.",
        err=True,
    )
    sys.exit(INTERRUPTED)
