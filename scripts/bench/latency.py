"""Real time: networks compressed to a budget of measured time, and what they then take.

    python scripts/bench/latency.py --models resnet18,vgg16 --latency 0.6 --threads 2

Each network (224 x 224, random weights: its time does not depend on them) is compressed through
`compress.compress_model`; the result and the folded dense network are then timed in turns, at batch
1 and at the chosen batch, each in the memory format that suits it. Beside the table it says which
layers were left dense and why.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict

import click
import torch

import compress
from compress.vision.torchvision import torchvision_model

# Smooth noise to calibrate on.
IMAGES = 64


@click.command()
@click.option("--models", default="resnet18,vgg16")
@click.option("--latency", default=0.6)
@click.option("--batch", default=8)
@click.option("--threads", default=2)
@click.option("--table", default="", help="Measured times of layers, reused where it exists.")
def main(models: str, latency: float, batch: int, threads: int, table: str) -> None:
    torch.set_num_threads(threads)
    print(
        "| network | budget | batch | dense, ms | compressed, ms | measured | MACs | format | run |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in models.split(","):
        torch.manual_seed(0)
        model = torchvision_model(name)
        coarse = torch.randn(IMAGES, 3, 14, 14)
        pictures = torch.nn.functional.interpolate(coarse, size=224, mode="bilinear")
        start = time.perf_counter()
        made = compress.compress_model(
            model, pictures, latency=latency, latency_batch=batch, calibration_images=IMAGES,
            refit=False, latency_table=table,
        )  # fmt: skip
        spent = time.perf_counter() - start
        cost = made.result.cost
        assert cost.compressed is not None
        assert cost.folded is not None
        for row in cost.latency:
            print(
                f"| {name} | {latency:g} | {row.batch_size} | {1e3 * row.dense_seconds:.1f} | "
                f"{1e3 * row.seconds:.1f} | {row.ratio:.3f} | "
                f"{cost.compressed.macs / cost.folded.macs:.2f} | {cost.memory_format} | "
                f"{spent:.0f} s |",
                flush=True,
            )
        reasons: dict[str, list[str]] = defaultdict(list)
        for layer in made.result.layers:
            if not layer.rewritten:
                reasons[layer.reason].append(layer.name)
        for reason, names in reasons.items():
            print(f"{name}: dense {', '.join(names)}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
