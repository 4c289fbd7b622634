"""``compress plan``: choose, and rewrite nothing."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from compress.commands.options import Settings, configured, example
from compress.commands.terminal import Terminal, table
from compress.errors import ArtefactError

if TYPE_CHECKING:
    from compress.plan import Choice, Plan


@click.command(
    epilog=example(
        "compress plan resnet18.pth --model torchvision:resnet18 --data imagefolder:train \\",
        "  --energy 0.999 --output plan.json",
    )
)
@click.argument("checkpoint", required=False)
@click.option("--output", metavar="FILE", help="Where to write the plan, as JSON.")
@click.option("--force", is_flag=True, default=None, help="Replace an existing file.")
@configured("model", "data", "rules", "schemes", "images", "calibration", "judging", "compute")
def plan(settings: Settings, terminal: Terminal) -> None:
    """Choose a scheme and a rank for every layer of CHECKPOINT, and rewrite nothing.

    Edit "scheme", "ranks" and "width" in the file as you like, then hand it to `compress apply`.
    """
    from compress.files import check_apart, check_file, write_atomically
    from compress.inputs.load import image_folders, input_paths
    from compress.pipeline.run import choose_plan

    config = settings.config()
    if config.output and os.path.exists(config.output) and not config.force:
        raise ArtefactError(f"The plan {config.output} exists; pass --force to replace it.")
    if config.output:
        check_apart(config.output, input_paths(config), image_folders(config))
        check_file(config.output, "plan")
    chosen, warnings = choose_plan(config, track=terminal.track)
    if config.output:
        write_atomically(config.output, chosen.to_json())
    lines = [*_lines(chosen), *(f"Warning: {w}" for w in warnings)]
    terminal.show(json.loads(chosen.to_json()), [*lines, *_where(config.output)])


def _where(output: str) -> list[str]:
    return ["", f"Plan: {output}" if output else "Not written; pass --output FILE to keep it."]


def _lines(plan: Plan) -> list[str]:
    from compress.report import text

    size = text.sizes_heading(map(asdict, plan.choices))

    def row(c: Choice) -> tuple[str, ...]:
        rank = text.sizes(asdict(c)) if c.rewritten else ""
        macs = text.count(c.dense_macs) + (f" → {text.count(c.macs)}" if c.rewritten else "")
        return c.name, c.shape, c.scheme, rank, macs, c.reason

    head = ("layer", "shape", "scheme", size, "MACs", "why")
    before = sum(c.dense_macs for c in plan.choices)
    after = sum(c.macs for c in plan.choices)
    return [
        *table(head, map(row, plan.choices), left=6),
        "",
        f"MACs {text.count(before)} → {text.count(after)} ({text.ratio(after / max(before, 1))}).",
    ]
