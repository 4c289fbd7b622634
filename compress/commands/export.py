"""``compress export``: a file that a runtime loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from compress.commands.options import FINITE, Settings, configured, example
from compress.commands.terminal import Terminal, table
from compress.config import EXPORTS
from compress.errors import ConfigError

if TYPE_CHECKING:
    from compress.pipeline.exported import Exported
    from compress.result import EndMetric


@click.command(
    epilog=example(
        "compress export smaller --to onnx --data imagefolder:train --test imagefolder:val \\",
        "  --output smaller.onnx",
    )
)
@click.argument("checkpoint", required=False, metavar="RESULT_OR_CHECKPOINT")
@click.option(
    "--to",
    "target",
    type=click.Choice(EXPORTS),
    default="onnx",
    show_default=True,
    help="An ONNX file; a program of torch.export, which runs where this package is not installed; "
    "or one that AOTInductor has compiled for machines such as this one.",
)
@click.option("--output", metavar="FILE", help="The file to write.")
@click.option("--force", is_flag=True, default=None, help="Replace an existing file.")
@click.option(
    "--opset",
    type=click.IntRange(min=1),
    metavar="N",
    help="Version of ONNX's operators (default: the exporter's choice).",
)
@click.option(
    "--fixed-batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Export for batches of N only; by default the batch size is open.",
)
@click.option(
    "--tolerance",
    type=FINITE,
    metavar="X",
    help="Fail where an output differs by more than X of its largest value (default 0.0001; for "
    "half precision 0.01, bfloat16 0.1).",
)
@click.option(
    "--int8",
    is_flag=True,
    help="Let the ONNX file compute in eight bits, but for layers that lose too much by it.",
)
@click.option(
    "--original",
    metavar="FILE",
    default="",
    help="The checkpoint that RESULT was made from, to be timed beside it on every runtime.",
)
@click.option(
    "--max-drop",
    type=FINITE,
    metavar="P",
    help="Fail where test accuracy falls by more than P points, from the original's where "
    "--original is given.",
)
@click.option(
    "--min-agreement",
    type=FINITE,
    metavar="A",
    help="Fail where fewer predictions on the test set than this share stay the same.",
)
@configured("model", "data", "test", "images", "evaluation", "compute")
def export(settings: Settings, terminal: Terminal, **asked: Any) -> None:
    """Export a result, or any checkpoint, for a runtime, and check the file before it is left.

    The file is loaded again and its outputs are compared with torch's on up to 64 images of --data;
    with --test the end metric is measured on both. All runtimes that are installed and take the
    file are timed beside torch.
    """
    from compress.artefact.manifest import is_artefact, read_manifest, recorded_settings
    from compress.deploy.file import Form
    from compress.pipeline.export import export_network
    from compress.pipeline.exported import Request

    tolerance = asked["tolerance"]
    if tolerance is not None and tolerance <= 0:
        raise ConfigError(f"tolerance = {tolerance:g} tolerates nothing; give more than 0.")
    for flag in ("opset", "int8"):
        if asked[flag] and asked["target"] != "onnx":
            raise ConfigError(f"--{flag} is a matter of ONNX files; leave it out with --to pt2.")
    path = settings.given("checkpoint")
    base = recorded_settings(read_manifest(path)) if path and is_artefact(path) else {}
    config = settings.config(**base)
    limits = [name for name in ("max_drop", "min_agreement") if settings.given(name) is not None]
    if limits and not config.test:
        raise ConfigError(f"--{limits[0].replace('_', '-')} needs a test set; pass --test SPEC.")
    form = Form(asked["target"], asked["opset"], asked["fixed_batch"])
    request = Request(
        form, tolerance, asked["original"], asked["int8"], trust_code=settings.trust_code
    )
    found = export_network(config, request, terminal.track)
    terminal.show(asdict(found), export_lines(found))


def export_lines(found: Exported) -> Iterator[str]:
    """What an export came to, line by line."""
    from compress.report import text

    batch = f"batches of {found.batch}" if found.batch else "batches of any size"
    kind = {"pt2": "torch.export", "aoti": "AOTInductor"}.get(found.target, "")
    kind = kind or f"ONNX, opset {found.opset}"
    yield f"{found.file}: {kind}, {text.size(found.bytes)}, {batch}"
    yield f"inputs: {', '.join(found.inputs)}"
    yield ""
    rows = [
        (
            each.name,
            str(list(each.shape)),
            f"{each.largest:.1e}",
            f"{each.mean:.1e}",
        )
        for each in found.outputs
    ]
    yield from table(("output", "shape", "largest difference", "mean difference"), rows)
    yield (
        f"Relative to torch, on {text.plural(found.images, 'image')}; at most "
        f"{found.tolerance:g} is tolerated."
    )
    yield from _int8_lines(found)
    if found.agreement is not None:
        yield f"Same predictions: {text.percent(found.agreement)}."
    if found.test is not None:
        yield from _test_lines(found.test, "in torch")
    if found.beside_original is not None:
        yield from _test_lines(found.beside_original, "of the original")
    if found.times:
        yield ""
        yield from _time_lines(found)
    yield from (f"Warning: {warning}" for warning in found.warnings)


def _int8_lines(found: Exported) -> Iterator[str]:
    from compress.report import text

    int8 = found.int8
    if int8 is None:
        return
    yield ""
    if int8.kept:
        yield (
            f"{int8.layers - len(int8.kept)} of {text.plural(int8.layers, 'layer')} in eight bits; "
            f"in float {', '.join(int8.kept)}, with {text.percent(int8.kept_macs, 1)} of the MACs."
        )
    else:
        yield f"All {text.plural(int8.layers, 'layer')} in eight bits."
    yield (
        f"Distance of the outputs from those in float: {text.number(int8.distance)} "
        f"({text.number(int8.distance_of_all)} with all layers in eight bits), on "
        f"{text.plural(int8.images[1], 'image')} beside the {int8.images[0]:,} calibrated on."
    )


def _test_lines(test: EndMetric, of: str) -> Iterator[str]:
    from compress.report import text

    where = f"on {text.plural(test.images, 'test image')}"
    if test.custom is not None:
        for each in (test.custom, *test.further):
            before, after = (text.measured(v, each.unit) for v in (each.before, each.after))
            yield f"{each.name} {where}: {before} {of}, {after} exported."
    elif test.top1_before is not None and test.top1_after is not None:
        before, after = text.percent(test.top1_before), text.percent(test.top1_after)
        change = f"{text.signed(-test.drop)} points" if test.drop is not None else ""
        if test.drop_interval is not None:
            low, high = test.drop_interval.low, test.drop_interval.high
            change += f", 95% interval {text.signed(-high)} to {text.signed(-low)}"
        yield f"Top-1 accuracy {where}: {before} {of}, {after} exported ({change})."


def _time_lines(found: Exported) -> Iterator[str]:
    from compress.report import text

    beside = any(each.original is not None for each in found.times)
    rows = []
    for each in found.times:
        row = [each.runtime, text.whole(each.batch_size)]
        if each.original is not None:
            row.append(text.seconds(each.original))
        row.append(text.seconds(each.seconds))
        if each.original is not None:
            row.append(text.ratio(each.seconds / each.original))
        rows.append(row)
    if beside:
        yield from table(("runtime", "batch", "original", "exported", "ratio"), rows)
    else:
        yield from table(("runtime", "batch", "time"), rows)
    yield f"Medians, {text.plural(found.threads, 'thread')}."
