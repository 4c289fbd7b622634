"""Points lost at a fraction of the cost, without retraining or labels: the README's main table.

    python scripts/bench/budgets.py --shared ../shared --macs 0.8,0.65,0.5,0.4,0.3 --seeds 3

For each seed a calibration set is drawn from the training images; plans, ranks and refits come from
those alone, and each result is judged once on all test images. One calibration serves all budgets
of a seed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click

from compress.config import RunConfig
from compress.inputs.load import load_network
from compress.measure.accuracy import Yardstick
from compress.pipeline.job import Job
from compress.pipeline.planning import choose
from compress.result import EndMetric

Budget = tuple[str, float]
HERE = Path(__file__).resolve().parents[2]


def measured(config: RunConfig, budgets: Sequence[Budget]) -> Iterator[tuple[Budget, EndMetric]]:
    """Each budget's result on the test images, on one calibration."""
    start = time.perf_counter()
    job = Job.open(load_network(config), config.with_rule("macs", 0.5)).with_images()
    calibration = job.calibrate(job.config.schemes_in_play)
    print(f"calibrated in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    test = job.inputs.test
    assert test is not None
    for rule, fraction in budgets:
        job = replace(job, config=config.with_rule(rule, fraction))
        replaced = job.fitter.carry_out(choose(job, calibration), calibration)
        yardstick = Yardstick(replace(job.loader, batch_size=256))
        found = yardstick.compare(job.network.original, replaced.model, test)
        yield (rule, fraction), found


@click.command()
@click.option("--shared", default=str(HERE.parent / "shared"), help="Folder with the real data.")
@click.option("--macs", default="0.8,0.65,0.5,0.4,0.3", help="Budgets of MACs; empty for none.")
@click.option("--params", default="0.65,0.5", help="Budgets of parameters; empty for none.")
@click.option("--seeds", default=3, help="Seeds 0, 1, ...")
@click.option("--images", default=2000, help="Calibration images, a quarter of them validating.")
def main(shared: str, macs: str, params: str, seeds: int, images: int) -> None:
    """Measure ResNet-20 on CIFAR-10 at each budget."""
    root = Path(shared)
    base = RunConfig(
        checkpoint=str(root / "checkpoints/resnet20-cifar10.safetensors"),
        model=str(HERE / "tests/networks/resnet20.py:resnet20"),
        data=f"imagefolder:{root / 'data/cifar10/train'}",
        test=f"imagefolder:{root / 'data/cifar10/test'}",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        calibration_images=images,
    )
    budgets = [("macs", float(f)) for f in macs.split(",") if f]
    budgets += [("params", float(f)) for f in params.split(",") if f]
    lost: dict[Budget, list[float]] = {b: [] for b in budgets}
    bounds: dict[Budget, list[str]] = {b: [] for b in budgets}
    for seed in range(seeds):
        for budget, metric in measured(base.replace(seed=seed), budgets):
            assert metric.drop is not None
            assert metric.drop_interval is not None
            lost[budget].append(metric.drop)
            interval = metric.drop_interval
            bounds[budget].append(f"{interval.low:.2f} to {interval.high:.2f}")
            before, after = 100 * (metric.top1_before or 0), 100 * (metric.top1_after or 0)
            print(f"seed {seed}, {budget}: {before:.2f} -> {after:.2f}", file=sys.stderr)
    print("| budget | points lost, mean | by seed | paired 95% intervals |")
    print("| --- | --- | --- | --- |")
    for (rule, fraction), values in lost.items():
        each = ", ".join(f"{v:.2f}" for v in values)
        intervals = "; ".join(bounds[rule, fraction])
        print(f"| {rule} {fraction:g} | {statistics.mean(values):.2f} | {each} | {intervals} |")


if __name__ == "__main__":
    main()
