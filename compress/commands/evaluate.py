"""``compress evaluate``: one model, measured."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from compress.commands.options import Settings, configured, example
from compress.commands.terminal import Terminal, table

if TYPE_CHECKING:
    from compress.pipeline.evaluate import Evaluation


@click.command(
    epilog=example(
        "compress evaluate smaller --test imagefolder:val",
        "compress evaluate resnet18.pth --model torchvision:resnet18 --test imagefolder:val",
    )
)
@click.argument("checkpoint", required=False, metavar="CHECKPOINT_OR_RESULT")
@configured("model", "data", "test", "images", "evaluation", "compute")
def evaluate(settings: Settings, terminal: Terminal) -> None:
    """Measure accuracy, MACs, parameters and latency of one model, original or compressed."""
    from compress.artefact.manifest import is_artefact, recorded_settings
    from compress.pipeline.evaluate import evaluate_model

    base = {}
    path = settings.given("checkpoint")
    if path and is_artefact(path):
        from compress.artefact.manifest import read_manifest

        base = recorded_settings(read_manifest(path))
    found = evaluate_model(
        settings.config(**base), trust_code=settings.trust_code, track=terminal.track
    )
    terminal.show(asdict(found), _lines(found))


def _lines(found: Evaluation) -> list[str]:
    from compress.report import text

    rows = [("images", text.whole(found.images))]
    if found.custom is not None:
        rows += [
            (measure.name, text.measured(measure.before, measure.unit))
            for measure in (found.custom, *found.further)
        ]
    if found.top1 is not None:
        rows.append(("top-1 accuracy", text.percent(found.top1)))
    if found.top5 is not None:
        rows.append(("top-5 accuracy", text.percent(found.top5)))
    if found.ece is not None:
        rows.append(("calibration error", text.percent(found.ece)))
    rows += [
        ("MACs", text.count(found.cost.macs)),
        ("parameters", text.whole(found.cost.params)),
        ("bytes", text.size(found.cost.bytes)),
    ]
    several = len({x.runtime for x in found.latency}) > 1
    for x in found.latency:
        where = f", {text.runtime(x.runtime)}" if several else ""
        rows.append((f"time, batch {x.batch_size}{where}", text.seconds(x.seconds)))
    kind = "compressed" if found.compressed else "original"
    head = (f"{found.model or 'model'} ({kind}, {found.dtype})", f"{found.device}")
    return [*table(head, rows), *(f"Warning: {w}" for w in found.warnings)]
