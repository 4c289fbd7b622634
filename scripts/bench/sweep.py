"""What a sweep costs beside its floor: one calibration and a plain evaluation of every point.

The sweep and its floor run in turns in one process, on the same images: ten thresholds without
refit, written to a temporary folder. The floor comes three ways: evaluations of the original that
read their images each time, as `compress evaluate` does; the same with the images held in memory,
as the sweep holds them; and of the ten compressed networks, images held, which leaves only what a
sweep adds of its own: plans, fits, rewriting, statistics of the comparison, files.

    python scripts/bench/sweep.py                        # ResNet-20, the data beside the checkout
    python scripts/bench/sweep.py --demo                 # the embedded network and images

On a machine that does other work meanwhile pass `--cpu-time`: what the process computed, not how
long it waited.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from compress.config import RunConfig, make_config
from compress.data import ImageSet, batches
from compress.data.held import hold
from compress.inputs.load import load_network
from compress.measure.accuracy import all_logits
from compress.sweep import parse_grid, sweep
from compress.sweep.work import SweepWork

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1.3


def settings(images: int, *, demo: bool) -> RunConfig:
    if demo:
        folder = ROOT / "compress" / "demo_data"
        named = {
            "checkpoint": str(folder / "digits-width32.safetensors"),
            "model": "compress.demo_data.network:width32",
            "data": f"tensors:{folder / 'digits-train.npz'}",
            "test": f"tensors:{folder / 'digits-test.npz'}",
            "resize": 28,
        }
    else:
        shared = ROOT.parent / "shared"
        named = {
            "checkpoint": str(shared / "checkpoints" / "resnet20-cifar10.safetensors"),
            "model": f"{ROOT / 'tests' / 'networks' / 'resnet20.py'}:resnet20",
            "data": f"imagefolder:{shared / 'data' / 'cifar10' / 'train'}",
            "test": f"imagefolder:{shared / 'data' / 'cifar10' / 'test'}",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        }
    return make_config({**named, "calibration_images": images, "refit": False})


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


def evaluate(models: list[nn.Module], sets: list[ImageSet], batch_size: int) -> None:
    for model in models:
        for images in sets:
            all_logits(model, batches(images, batch_size), "evaluate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--images", type=int, default=1000, help="calibration images")
    parser.add_argument("--no-test", action="store_true", help="judge on validation images alone")
    parser.add_argument("--grid", default="1e-4:1e-1:10")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    config = settings(arguments.images, demo=arguments.demo)
    if arguments.no_test:
        config = config.replace(test="")
    grid = parse_grid("threshold", arguments.grid)
    inputs = load_network(config)
    work = SweepWork(inputs, config, grid)
    job, batch_size = work.job, work.job.loader.batch_size
    sets = [s for s in (inputs.split.validation, inputs.test) if s is not None]
    held = [hold(images, job.loader) for images in sets]
    models = [job.fitter.carry_out(work.planner(v), work.calibration).model for v in grid.values]
    times: dict[str, list[float]] = {}

    def swept() -> None:
        with tempfile.TemporaryDirectory() as folder:
            sweep(config.replace(output=str(Path(folder) / "sweep")), grid)

    count = len(grid.values)
    original = [job.network.original] * count
    steps: dict[str, Callable[[], object]] = {
        "calibration": lambda: job.calibrate(job.config.schemes_in_play),
        f"{count} evaluations of the original, images read each time": lambda: evaluate(
            original, sets, batch_size
        ),
        f"{count} evaluations of the original, images held": lambda: evaluate(
            original, held, batch_size
        ),
        f"{count} evaluations of the points' networks, images held": lambda: evaluate(
            models, held, batch_size
        ),
        f"sweep of {count} points, all of it": swept,
    }
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            times.setdefault(name, []).append(seconds(step, clock))
    medians = {name: statistics.median(found) for name, found in times.items()}
    calibration, *floors, total = medians.values()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, "
        f"{platform.machine()}, medians of {arguments.rounds} rounds in turns; "
        f"{len(inputs.split.fit)} images calibrate, {sum(map(len, sets)):,} judge each point"
    )
    unit = "CPU seconds" if arguments.cpu_time else "seconds"
    print(f"| what | {unit} | sweep over calibration and this (limit {LIMIT}) |")
    print("| --- | ---: | ---: |")
    for name, found in medians.items():
        ratio = f"{total / (calibration + found):.2f}" if found in floors else ""
        print(f"| {name} | {found:.2f} | {ratio} |")


if __name__ == "__main__":
    main()
