"""What the companion modules cost against plain torch, side by side.

Every row alternates the two candidates call by call in one process and compares their medians;
the last row is a time in seconds. Run from a checkout, in the project's environment:

    python scripts/bench/modules.py
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress.modules.flat import FlatModule
from compress.modules.hypernet import hypernetize
from compress.modules.overparam import OverparamConv2d, OverparamLinear, collapse, overparameterize
from compress.vision.torchvision import torchvision_model

Step = Callable[[], None]


def alternate(one: Step, other: Step, repeats: int) -> tuple[float, float]:
    """Median seconds of each, measured in turns, the order turned round every time.

    Short steps are repeated until they fill ten seconds.
    """
    for step in (one, other) * 2:
        step()
    times: dict[Step, list[float]] = {one: [], other: []}
    until = time.perf_counter() + 10
    repeat = 0
    while repeat < repeats or time.perf_counter() < until:
        repeat += 1
        for step in (one, other) if repeat % 2 else (other, one):
            start = time.perf_counter()
            step()
            times[step].append(time.perf_counter() - start)
    return statistics.median(times[one]), statistics.median(times[other])


def forward(module: nn.Module, x: Tensor) -> Step:
    def step() -> None:
        with torch.no_grad():
            module(x)

    return step


def both_ways(module: nn.Module, x: Tensor, leaves: list[Tensor]) -> Step:
    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        module(x).square().mean().backward()

    return step


def overparam_rows(repeats: int) -> list[tuple[str, float, float, float]]:
    rows = []
    image = torch.randn(8, 64, 56, 56)
    tokens = torch.randn(1024, 512)
    cases: list[tuple[str, OverparamConv2d | OverparamLinear, Tensor]] = [
        ("conv 64 [3, 1] eval forward", OverparamConv2d(64, 64, [3, 1]), image),
        (
            "conv 64 [3, 1, 1, 1] BN, residual, eval forward",
            OverparamConv2d(64, 64, 3, depth=4, batch_norm=True, residual=True),
            image,
        ),
        ("linear 512 depth 3 eval forward", OverparamLinear(512, 512, depth=3), tokens),
    ]
    for name, layer, x in cases:
        layer.eval()
        plain = layer.collapse()
        rows.append((name, *alternate(forward(plain, x), forward(layer, x), repeats), 1.05))
    return rows


def resnet18_rows(repeats: int, batch: int, size: int) -> list[tuple[str, float, float, float]]:
    x = torch.randn(batch, 3, size, size)
    rows = []
    for training in (False, True):
        plain = torchvision_model("resnet18").train(training)
        flat = FlatModule(copy.deepcopy(plain))
        hyper, values = hypernetize(copy.deepcopy(plain), return_values=True)
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        hyper.set_externals(leaves)
        mode = "train" if training else "eval"
        cases: tuple[tuple[str, nn.Module, list[Tensor]], ...] = (
            ("FlatModule(resnet18)", flat, [flat.flat_param]),
            ("hypernetized resnet18, constant values", hyper, list(leaves.values())),
        )
        for name, module, own in cases:
            if not training:
                pair = alternate(forward(plain, x), forward(module, x), repeats)
                rows.append((f"{name} {mode} forward", *pair, 1.10))
            pair = alternate(
                both_ways(plain, x, list(plain.parameters())), both_ways(module, x, own), repeats
            )
            rows.append((f"{name} {mode} forward+backward", *pair, 1.10))
    return rows


def collapse_seconds() -> tuple[float, float]:
    """Seconds (wall, processor) to collapse an over-parameterised ResNet-50, medians of three."""
    model = overparameterize(torchvision_model("resnet50"), init="fresh").eval()
    walls, processors = [], []
    for _ in range(3):
        wall, processor = time.perf_counter(), time.process_time()
        collapse(model)
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    return statistics.median(walls), statistics.median(processors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, "
        f"{platform.machine()}, "
        f"at least {arguments.repeats} alternating runs, load {os.getloadavg()[0]:.1f}"
    )
    print("| what | plain, ms | ours, ms | ratio | limit |\n| --- | --- | --- | --- | --- |")
    rows = overparam_rows(arguments.repeats)
    rows += resnet18_rows(arguments.repeats, arguments.batch, arguments.size)
    for name, plain, ours, limit in rows:
        print(
            f"| {name} | {plain * 1e3:.2f} | {ours * 1e3:.2f} | {ours / plain:.3f} | {limit:.2f} |"
        )
    wall, processor = collapse_seconds()
    print(f"| collapse(resnet50, depth 2), seconds | | {wall:.2f} ({processor:.2f} CPU) | | 5 |")


if __name__ == "__main__":
    main()
