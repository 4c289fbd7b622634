"""``compress verify``: the gates again."""

from __future__ import annotations

import click

from compress.commands.options import Settings, configured, example
from compress.commands.terminal import Terminal
from compress.errors import GateError


@click.command(
    epilog=example(
        "compress verify smaller --checkpoint resnet18.pth --test imagefolder:other --max-drop 1",
    )
)
@click.argument("artefact", metavar="RESULT")
@click.option("--checkpoint", metavar="FILE", help="The original that was compressed.")
@configured("model", "test", "gates", "images", "evaluation", "compute")
def verify(settings: Settings, terminal: Terminal, artefact: str) -> None:
    """Hold RESULT to its gates again, on another test set or machine.

    Model, preprocessing and limits are those of the run unless you give others. The errors of
    layers are measured on the test images.
    """
    from compress.artefact.manifest import read_manifest, recorded_settings
    from compress.commands.summary import run_summary
    from compress.pipeline.verify import verify_result
    from compress.report import build_report, gate_sentence
    from compress.result import GateResult

    config = settings.config(**recorded_settings(read_manifest(artefact)))
    found = verify_result(config, artefact, trust_code=settings.trust_code, track=terminal.track)
    report = build_report(found.result)
    terminal.show(report, run_summary(report, measured_on="the test images"))
    failed = [gate_sentence(GateResult(**gate)) for gate in report["gates"] if not gate["passed"]]
    if failed:
        raise GateError(" ".join(failed))
