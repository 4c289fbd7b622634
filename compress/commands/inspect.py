"""``compress inspect``: what there is to compress."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from compress.commands.options import Settings, configured, example
from compress.commands.terminal import Terminal, shortened, table

if TYPE_CHECKING:
    from compress.pipeline.inspect import InspectedLayer, Inspection


def _shapes(
    _: click.Context, __: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[int, ...], ...]:
    return tuple(map(_shape, values))


def _shape(value: str) -> tuple[int, ...]:
    parts = value.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"{value!r} is not a shape such as 3,224,224")
    return tuple(int(part) for part in parts)


@click.command(
    epilog=example(
        "compress inspect resnet18.pth --model torchvision:resnet18 --data imagefolder:train",
    )
)
@click.argument("checkpoint", required=False)
@click.option("--input-shape", metavar="C,H,W", callback=_shapes, multiple=True, help="Shape of "
              "one input, where neither --data nor the model says it; once for each input that the "
              "forward takes.")  # fmt: skip
@configured("model", "data", "images", "sample", "compute")
def inspect(
    settings: Settings, terminal: Terminal, input_shape: tuple[tuple[int, ...], ...]
) -> None:
    """List every layer of CHECKPOINT: cost, break-even rank, schemes or why it is kept.

    Then the groups of channels that can be taken out of several layers together.

    With --data also the spectra, and the rank that each rule would choose.
    """
    from compress.pipeline.inspect import inspect_checkpoint

    found = inspect_checkpoint(settings.config(), input_shape, terminal.track)
    terminal.show(asdict(found), _lines(found))


def _sizes(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " and ".join("x".join(map(str, shape)) for shape in shapes)


def _lines(found: Inspection) -> list[str]:
    from compress.report import text

    rules = next((list(x.ranks) for x in found.layers if x.ranks), [])
    head = ["layer", "kind", "shape", "schemes", "MACs", "parameters", "full rank", "break-even"]
    lines = table([*head, *rules], [_row(x, rules) for x in found.layers], left=4)
    kept = [x for x in found.layers if x.reason]
    lines += ["", *(f"Kept {x.name or '(the model itself)'}: {x.reason}" for x in kept)]
    lines += [""] if kept else []
    lines += _channels(found)
    lines.append(
        f"{text.plural(len(found.layers), 'layer')}; MACs {text.count(found.folded.macs)}, "
        f"parameters {text.whole(found.original.params)}, {text.size(found.original.bytes)} in "
        f"{found.dtype}, for one input of {_sizes(found.input_shapes)}."
    )
    if found.norms:
        lines.append(f"{text.plural(len(found.norms), 'norm')} folded into the layer before.")
    if found.unpacked:
        lines.append(f"{text.plural(len(found.unpacked), 'attention module')} taken apart.")
    if found.baked:
        lines.append(f"{text.plural(len(found.baked), 'module')} with computed weights made plain.")
    if found.plain:
        lines.append(f"{text.plural(len(found.plain), 'subclass', 'subclasses')} made plain.")
    lines.append(
        "A refit goes along the graph, layer by layer and then jointly."
        if found.refit_path == "graph"
        else "A refit goes layer by layer only, since there is no graph."
    )
    if found.images:
        lines.append(f"Spectra of the outputs from {text.plural(found.images, 'image')}.")
    return [*lines, *(f"Warning: {w}" for w in found.warnings)]


def _channels(found: Inspection) -> list[str]:
    """The groups of channels that can be taken out, and why other outputs are left."""
    from compress.report import text

    head = ("channels", "made by", "changed by", "read by", "scheme", "number")
    rows = [
        (g.name, shortened(g.made_by), shortened(g.changed_by) or text.UNKNOWN,
         shortened(g.read_by), g.way, str(g.size))
        for g in found.groups
    ]  # fmt: skip
    lines = [*table(head, rows, left=5), ""] if rows else []
    # Outputs of several layers are often left for one reason.
    left: dict[str, list[str]] = defaultdict(list)
    for group in found.groups:
        if group.reason is not None:
            left[group.reason].append(group.name)
    for name, reason in found.left.items():
        left[reason].append(name)
    said = [f"No channels taken out of {shortened(names)}: {why}" for why, names in left.items()]
    return lines + ([*said, ""] if said else [])


def _row(layer: InspectedLayer, rules: list[str]) -> list[str]:
    from compress.report import text

    rewritable = layer.reason is None
    return [
        layer.name or "(model)",
        layer.kind,
        layer.shape,
        ", ".join(layer.schemes) or "kept",
        text.count(layer.macs),
        text.whole(layer.params),
        str(layer.full_rank) if layer.full_rank else text.UNKNOWN,
        str(layer.break_even) if rewritable else text.UNKNOWN,
        *(str(layer.ranks[rule]) if layer.ranks else text.UNKNOWN for rule in rules),
    ]
