"""Points lost before and after ``compress recover``: ResNet-20 on CIFAR-10, no labels.

    python scripts/bench/recover.py --shared ../shared --macs 0.3 --course "--minutes 10"

For each seed and budget the network is compressed with the defaults and then recovered on the
training images, whose labels nothing looks at; both are judged once on all test images. Each
course is a recovery of the same compressed network.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import click

from compress.commands.group import cli

HERE = Path(__file__).resolve().parents[2]


def command(*arguments: str) -> None:
    """Run a command of ``compress``.

    Raises:
        SystemExit: It failed.
    """
    try:
        cli.main(list(arguments))
    except SystemExit as ended:
        if ended.code:
            raise


def result_of(folder: Path) -> dict[str, Any]:
    """The result in a folder, as plain data."""
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())["result"]
    return found


def lost(folder: Path) -> str:
    """Points lost on the test images, with the paired interval."""
    test = result_of(folder)["test"]
    interval = test["drop_interval"]
    return f"{test['drop']:.2f} ({interval['low']:.2f} to {interval['high']:.2f})"


def row(before: Path, after: Path) -> str:
    """A recovery as a row of the table."""
    recovery = result_of(after)["recovery"]
    spent = recovery["seconds"]
    shares = ", ".join(
        f"{what} {spent[what] / spent['all']:.0%}" for what in ("images", "original", "search")
    )
    return (
        f"{lost(before)} | {lost(after)} | {recovery['start']:.3f} | {recovery['best']:.3f} "
        f"| {recovery['steps']} of {recovery['batch_size']} | {spent['all']:.0f} | {shares} "
        f"| {recovery['rate']:g}, {recovery['augmentation']}, {recovery['precision']}"
    )


def some_of(folder: Path, count: int, seed: int, to: Path) -> Path:
    """Copy so many images of a folder of classes, drawn by a seed."""
    files = sorted(f for f in folder.glob("*/*") if f.is_file())
    for file in random.Random(seed).sample(files, count):
        target = to / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return to


@click.command()
@click.option("--shared", default=str(HERE.parent / "shared"), help="Folder with the real data.")
@click.option("--macs", default="0.5,0.4,0.3,0.2", help="Budgets of MACs.")
@click.option("--seeds", default="0,1,2", help="Seeds.")
@click.option("--images", default=0, help="So many of the images, in place of all.")
@click.option(
    "--course",
    "courses",
    default=["--minutes 1", "--minutes 10"],
    multiple=True,
    help="Options of a recovery.",
)
def main(shared: str, macs: str, seeds: str, images: int, courses: tuple[str, ...]) -> None:
    """Measure recoveries of ResNet-20."""
    root = Path(shared)
    checkpoint = str(root / "checkpoints/resnet20-cifar10.safetensors")
    print("| MACs kept | seed | course | points lost before | after | distance before | after "
          "| steps | seconds | of these | rate, pictures, precision |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for fraction, seed in itertools.product(macs.split(","), seeds.split(",")):
        with tempfile.TemporaryDirectory() as name:
            before, after = Path(name) / "before", Path(name) / "after"
            learning = root / "data/cifar10/train"
            if images:
                learning = some_of(learning, images, int(seed), Path(name) / "images")
            data = [
                "--data", f"imagefolder:{learning}",
                "--test", f"imagefolder:{root / 'data/cifar10/test'}",
                "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225", "--quiet",
                "--no-latency", "--model", str(HERE / "tests/networks/resnet20.py:resnet20"),
            ]  # fmt: skip
            command("run", checkpoint, *data, "--macs", fraction, "--seed", seed,
                    "--output", str(before))  # fmt: skip
            for course in courses:
                command("recover", str(before), "--checkpoint", checkpoint, *data,
                        *course.split(), "--output", str(after), "--force")  # fmt: skip
                rest = row(before, after)
                print(f"| {fraction} | {seed} | {course} | {rest} |", flush=True)


if __name__ == "__main__":
    main()
