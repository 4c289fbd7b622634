"""Budgets of time on the runtimes that networks ship on, and how long an export takes.

    python scripts/bench/deploy.py --models resnet18,vgg16,mobilenet_v2 --latency 0.6 --threads 2
    python scripts/bench/deploy.py --export resnet50 --threads 2

Each network (224 x 224, random weights: its time does not depend on them) is compressed through
`compress.compress_model` to a share of its time on one runtime. The original as it came and the
result are then timed, each in turns with the original with its norms folded, on every runtime that
is installed, beside what the run itself measured; what they give is compared with torch. With
``--export``, a network is exported through the command line, with all of its checks.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from torch import nn

import compress
from compress.config import TORCH
from compress.deploy.engines import exported
from compress.errors import BudgetError
from compress.running.structure import expanded
from compress.timing.runtimes import time_runtimes
from compress.vision.torchvision import torchvision_model

# Smooth noise to calibrate on: so little that nothing is checked on images held back, which would
# take long and is about losses alone. And how long the last comparison may take.
IMAGES, SECONDS = 28, 60.0
# As many as an export is checked on.
EXPORT_IMAGES = 64
HEAD = (
    "network", "batch", "budget on", "MACs", "runtime", "original, ms", "folded, ms",
    "compressed, ms", "ratio", "in the run", "difference",
)  # fmt: skip


def pictures(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, 14, 14, generator=generator)
    return nn.functional.interpolate(coarse, size=224, mode="bilinear")


def row(cells: tuple[object, ...]) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def everywhere(model: nn.Module, batch: torch.Tensor) -> dict[str, nn.Module]:
    networks, problems = exported(model, [batch])
    for problem in problems:
        print(problem, file=sys.stderr)
    return {TORCH: model, **networks}


def budget(name: str, batch: int, runtime: str, latency: float) -> None:
    torch.manual_seed(0)
    model = torchvision_model(name).eval()
    made = compress.compress_model(
        model, pictures(IMAGES), latency=latency, latency_batch=batch, runtime=runtime,
        calibration_images=IMAGES, refit=False,
    )  # fmt: skip
    assert made.result.cost.compressed is not None
    assert made.result.cost.folded is not None
    macs = made.result.cost.compressed.macs / made.result.cost.folded.macs
    cost = made.result.cost
    own = {(x.runtime, x.batch_size): f"{x.ratio:.3f}" for x in (*cost.latency, *cost.beside)}
    example = pictures(1)
    inputs = expanded(example, batch)
    kinds = {"original": model, "folded": made.network.model, "compressed": made.model.eval()}
    networks = {kind: everywhere(each, inputs) for kind, each in kinds.items()}
    found = {}
    for kind in ("original", "compressed"):  # each in turns with the folded one
        times = time_runtimes(networks[kind], networks["folded"], example, [batch], SECONDS)
        found[kind] = {each.runtime: each for each in times}
    with torch.no_grad():
        expected = made.model(inputs)
        for name_of, each in found["compressed"].items():
            outputs = networks["compressed"][name_of](inputs)
            difference = ((outputs - expected).abs().max() / expected.abs().max()).item()
            assert each.original is not None
            before = found["original"][name_of]
            assert before.original is not None
            original = each.original * before.seconds / before.original
            row(
                (
                    name, batch, runtime, f"{macs:.2f}", name_of,
                    f"{1e3 * original:.1f}", f"{1e3 * each.original:.1f}",
                    f"{1e3 * each.seconds:.1f}", f"{each.seconds / each.original:.3f}",
                    own.get((name_of, batch), ""),
                    f"{difference:.0e}",
                )
            )  # fmt: skip


def export_time(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        weights, images = Path(folder) / "net.safetensors", Path(folder) / "images.safetensors"
        torch.manual_seed(0)
        save_file(torchvision_model(name).state_dict(), weights)
        save_file({"images": pictures(EXPORT_IMAGES)}, images)
        started = time.perf_counter()
        subprocess.run(
            [
                sys.executable, "-m", "compress.commands", "export", str(weights), "--model",
                f"torchvision:{name}", "--data", f"tensors:{images}", "--output",
                str(Path(folder) / "net.onnx"), "--threads", str(torch.get_num_threads()),
            ],
            check=True,
        )  # fmt: skip
        print(f"{name}: {time.perf_counter() - started:.0f} s")


@click.command()
@click.option("--models", default="resnet18,vgg16,mobilenet_v2")
@click.option("--runtimes", default="torch,onnxruntime,openvino", help="That budgets are set for.")
@click.option("--batches", default="1,8")
@click.option("--latency", default=0.6)
@click.option("--threads", default=2)
@click.option("--export", "to_export", default="", help="Only time the export of this network.")
def main(models: str, runtimes: str, batches: str, latency: float, **others: Any) -> None:
    torch.set_num_threads(others["threads"])
    to_export = others["to_export"]
    if to_export:
        export_time(to_export)
        return
    row(HEAD)
    row(("---",) * len(HEAD))
    for name in models.split(","):
        for runtime in runtimes.split(","):
            for batch in batches.split(","):
                try:
                    budget(name, int(batch), runtime, latency)
                except BudgetError as error:
                    row((name, batch, runtime, error, *[""] * (len(HEAD) - 4)))


if __name__ == "__main__":
    main()
