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
from dataclasses import replace
from pathlib import Path

import click

from compress.choose import make_plan
from compress.config import RunConfig
from compress.fit.layers import fit_plan
from compress.inputs.load import batch_size_for, load_network
from compress.measure.accuracy import compare
from compress.network.baseline import prepare
from compress.pipeline.run import calibrated
from compress.progress import silent

HERE = Path(__file__).resolve().parents[2]


@click.command()
@click.option("--shared", default=str(HERE.parent / "shared"), help="Folder with the real data.")
@click.option("--macs", default="0.8,0.65,0.5,0.4,0.3", help="Budgets of MACs; empty for none.")
@click.option("--params", default="0.65,0.5", help="Budgets of parameters; empty for none.")
@click.option("--seeds", default=3, help="Seeds 0, 1, ...")
@click.option("--images", default=2000, help="Calibration images, a quarter of them validating.")
@click.option("--refit/--no-refit", default=True)
def main(shared: str, macs: str, params: str, seeds: int, images: int, refit: bool) -> None:
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
        refit=refit,
    )
    budgets = [("macs", float(f)) for f in macs.split(",") if f]
    budgets += [("params", float(f)) for f in params.split(",") if f]
    lost: dict[tuple[str, float], list[float]] = {b: [] for b in budgets}
    bounds: dict[tuple[str, float], list[str]] = {b: [] for b in budgets}
    for seed in range(seeds):
        config = replace(base, seed=seed)
        inputs = load_network(config)
        network = prepare(inputs.model, inputs.example)
        batch = batch_size_for(config, inputs.example)
        start = time.perf_counter()
        first = replace(config, macs=0.5)
        calibration = calibrated(network, inputs, first, first.schemes_in_play, batch, silent)
        print(f"seed {seed}: calibrated in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        for rule, fraction in budgets:
            start = time.perf_counter()
            settings = replace(config, **{rule: fraction})
            plan = make_plan(network.model, network.sites, calibration, settings)
            replaced = fit_plan(network, plan, calibration, settings, inputs.split, batch, silent)
            spent = time.perf_counter() - start
            assert inputs.test is not None
            metric = compare(
                network.original, replaced.model, inputs.test, settings, batch_size=256
            )
            assert metric.drop is not None
            assert metric.drop_interval is not None
            lost[rule, fraction].append(metric.drop)
            interval = metric.drop_interval
            bounds[rule, fraction].append(f"{interval.low:.2f} to {interval.high:.2f}")
            print(
                f"seed {seed}, {rule} {fraction}: {100 * (metric.top1_before or 0):.2f} -> "
                f"{100 * (metric.top1_after or 0):.2f}, {spent:.0f} s",
                file=sys.stderr,
            )
    print("| budget | points lost, mean | by seed | paired 95% intervals |")
    print("| --- | --- | --- | --- |")
    for (rule, fraction), values in lost.items():
        each = ", ".join(f"{v:.2f}" for v in values)
        intervals = "; ".join(bounds[rule, fraction])
        print(f"| {rule} {fraction:g} | {statistics.mean(values):.2f} | {each} | {intervals} |")


if __name__ == "__main__":
    main()
