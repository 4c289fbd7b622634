"""Points lost before and after ``compress recover``: ResNet-20 on CIFAR-10, no labels.

    python scripts/bench/recover.py --shared ../shared --macs 0.5,0.4,0.3,0.2 --seeds 3 --minutes 10

For each seed and budget the network is compressed with the defaults and then recovered on all
training images, whose labels nothing looks at; both are judged once on all test images.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
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


def drop(folder: Path) -> float:
    """Points lost on the test images."""
    return float(result_of(folder)["test"]["drop"])


def compared(root: Path, fraction: str, seed: int, length: Sequence[str]) -> tuple[float, float]:
    """Points lost by one network before and after its recovery."""
    data = [
        "--data", f"imagefolder:{root / 'data/cifar10/train'}",
        "--test", f"imagefolder:{root / 'data/cifar10/test'}",
        "--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225", "--no-latency", "--quiet",
        "--model", str(HERE / "tests/networks/resnet20.py:resnet20"),
    ]  # fmt: skip
    checkpoint = str(root / "checkpoints/resnet20-cifar10.safetensors")
    with tempfile.TemporaryDirectory() as name:
        before, after = Path(name) / "before", Path(name) / "after"
        command("run", checkpoint, *data, "--macs", fraction, "--seed", str(seed),
                "--output", str(before))  # fmt: skip
        command("recover", str(before), "--checkpoint", checkpoint, *data, *length,
                "--output", str(after))  # fmt: skip
        recovery = result_of(after)["recovery"]
        spent = recovery["seconds"]
        shares = ", ".join(
            f"{what} {spent[what] / spent['all']:.0%}" for what in ("images", "original", "search")
        )
        print(
            f"seed {seed}, {fraction}: {lost(before)} -> {lost(after)} points lost; "
            f"{recovery['steps']} steps of {recovery['batch_size']} in {spent['all']:.0f} s "
            f"({shares}), rate {recovery['rate']:g}, pictures {recovery['augmentation']}",
            file=sys.stderr,
        )
        return drop(before), drop(after)


@click.command()
@click.option("--shared", default=str(HERE.parent / "shared"), help="Folder with the real data.")
@click.option("--macs", default="0.5,0.4,0.3,0.2", help="Budgets of MACs.")
@click.option("--seeds", default=3, help="Seeds 0, 1, ...")
@click.option("--minutes", default="10", help="For each recovery; empty with --steps.")
@click.option("--steps", default="", help="Steps in place of minutes.")
def main(shared: str, macs: str, seeds: int, minutes: str, steps: str) -> None:
    """Measure recoveries of ResNet-20."""
    length = ["--steps", steps] if steps else ["--minutes", minutes]
    print("| MACs kept | points lost before | after | after, by seed |")
    print("| --- | --- | --- | --- |")
    for fraction in macs.split(","):
        found = [compared(Path(shared), fraction, seed, length) for seed in range(seeds)]
        before, after = zip(*found, strict=True)
        each = ", ".join(f"{v:.2f}" for v in after)
        means = f"{statistics.mean(before):.2f} | {statistics.mean(after):.2f}"
        print(f"| {fraction} | {means} | {each} |")


if __name__ == "__main__":
    main()
