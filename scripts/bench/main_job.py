"""What the main job costs beside its floor, on ResNet-50 at 224 x 224 with random weights.

    python scripts/bench/main_job.py --threads 2

Four figures, each against its limit: calibrating output statistics over plain forward passes of the
same batches, in turns (in torch's default memory format, and in the one that calibration runs in);
growth of peak memory with the number of images; seconds to plan and rewrite by threshold; seconds
that ``compress --help`` takes.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import click
import torch
from torch import Tensor, nn

from compress.calibrate.collect import calibrate
from compress.calibrate.recipe import Recipe
from compress.calibrate.statistics import Calibration, Source
from compress.choose import Chooser
from compress.config import RunConfig
from compress.data import Loader, as_images, split
from compress.fit.layers import Fitter
from compress.network.baseline import Network, prepare
from compress.running.forward import evaluation_mode
from compress.running.memory_format import in_format, in_memory_format
from compress.vision.torchvision import torchvision_model


def batches(count: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randn(size, 3, 224, 224, generator=generator), torch.zeros(size)


def plain(model: nn.Module, count: int, size: int, memory_format: str = "contiguous") -> float:
    start = time.perf_counter()
    with torch.no_grad(), evaluation_mode(model), in_memory_format(model, memory_format):
        for images, _ in batches(count, size):
            model(in_format(images, memory_format))
    return time.perf_counter() - start


def calibrated(network: Network, count: int, size: int) -> tuple[float, Calibration]:
    start = time.perf_counter()
    source = Source(count * size, memory_format=network.memory_format)
    recipe = Recipe(weigh=False)
    found = calibrate(network.model, network.sites, batches(count, size), source, recipe)
    return time.perf_counter() - start, found


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


@click.command()
@click.option("--threads", default=2)
@click.option("--count", default=2, help="Batches a turn.")
@click.option("--size", default=16, help="Images a batch.")
@click.option("--rounds", default=3)
def main(threads: int, count: int, size: int, rounds: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = torchvision_model("resnet50").eval()
    network = prepare(model, torch.randn(1, 3, 224, 224))
    plain(network.model, 1, size)
    _, calibration = calibrated(network, 1, size)
    before = peak()
    ratios, in_its_format = [], []
    for _ in range(rounds):
        floor = plain(network.model, count, size)
        spent, calibration = calibrated(network, count, size)
        ratios.append(spent / floor)
        in_its_format.append(spent / plain(network.model, count, size, network.memory_format))
    small = peak()
    calibrated(network, 3 * count, size)
    large = peak()
    start = time.perf_counter()
    config = RunConfig(rules={"threshold": 1e-2}, metric="mse", refit=False)
    plan = Chooser(network.model, network.sites, calibration, config).plan()
    parts = split(as_images(torch.randn(4, 3, 224, 224)), 4, 0)
    Fitter(network, parts, Loader(size), Recipe(weigh=False), refit=False).carry_out(
        plan, calibration
    )
    planning = time.perf_counter() - start
    command = [sys.executable, "-m", "compress.commands", "--help"]
    starts = []
    for _ in range(5):
        begun = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        starts.append(time.perf_counter() - begun)
    print("| what | measured | limit |")
    print("| --- | --- | --- |")
    each = ", ".join(f"{r:.2f}" for r in ratios)
    print(f"| calibration / forward passes | {statistics.median(ratios):.2f} ({each}) | 1.25 |")
    print(
        f"| the same, passes in {network.memory_format} as calibration is | "
        f"{statistics.median(in_its_format):.2f} | |"
    )
    print(
        f"| peak memory, 1 / {count} / {3 * count} batches | {before:.2f} / {small:.2f} / "
        f"{large:.2f} GiB | does not grow |"
    )
    print(f"| planning and rewriting | {planning:.1f} s | 10 s |")
    print(f"| compress --help | {statistics.median(starts):.2f} s | 0.5 s |")


if __name__ == "__main__":
    main()
