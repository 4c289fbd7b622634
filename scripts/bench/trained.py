"""Points lost by networks for CIFAR-10 that are trained here first, one at a time.

    python scripts/bench/trained.py train vit --shared ../shared --output runs/vit
    python scripts/bench/trained.py sweep vit --output runs/vit

A network learns from 16,000 of the training images. It has never seen the other 4,000, so that
settings may be chosen by them; the test images judge once.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from compress.commands.group import cli
from compress.data import Preprocessing, open_dataset
from compress.files import write_atomically
from compress.vision.torchvision import load_torchvision

HERE = Path(__file__).resolve()
UNSEEN = 4000
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


class Inverted(nn.Module):
    """An inverted residual block (Sandler et al., "MobileNetV2", 2018)."""

    def __init__(self, before: int, after: int, stride: int, times: int = 4) -> None:
        super().__init__()
        hidden = times * before
        self.residual = stride == 1 and before == after
        self.layers = nn.Sequential(
            *_convolution(before, hidden, 1),
            *_convolution(hidden, hidden, 3, stride, hidden),
            *_convolution(hidden, after, 1)[:2],
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, before, H, W]`` to ``[N, after, H / stride, W / stride]``."""
        found: Tensor = self.layers(x)
        return x + found if self.residual else found


def _convolution(
    before: int, after: int, side: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    return [
        nn.Conv2d(before, after, side, stride, side // 2, groups=groups, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU6(),
    ]


def mobile() -> nn.Module:
    """The network with random weights, for ``[N, 3, 32, 32]``."""
    shape = ((32, 1), (32, 1), (64, 2), (64, 1), (64, 1), (96, 1), (96, 1))
    layers, before = _convolution(3, 32, 3, 2), 32
    for after, stride in shape:
        layers.append(Inverted(before, after, stride))
        before = after
    return nn.Sequential(
        *layers, *_convolution(before, 256, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def vit() -> nn.Module:
    """A vision transformer with a class token, of 64 patches (Dosovitskiy et al., 2021)."""
    torchvision, _ = load_torchvision()
    model: nn.Module = torchvision.models.VisionTransformer(
        image_size=32, patch_size=4, num_layers=6, num_heads=4, hidden_dim=128, mlp_dim=512,
        num_classes=10,
    )  # fmt: skip
    return model


def convnext() -> nn.Module:
    """Depthwise convolutions and linear layers by turns (Liu et al., "ConvNeXt", 2022)."""
    torchvision, _ = load_torchvision()
    block = torchvision.models.convnext.CNBlockConfig
    model: nn.Module = torchvision.models.ConvNeXt(
        [block(48, 96, 2), block(96, 192, 4), block(192, None, 2)],
        stochastic_depth_prob=0.1, layer_scale=0.1, num_classes=10,
    )  # fmt: skip
    return model


NETWORKS = {"mobile": mobile, "vit": vit, "convnext": convnext}


def _arrays(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of a folder, ``[N, 3, 32, 32]`` in bytes, and their classes."""
    pictures = open_dataset(f"imagefolder:{folder}", Preprocessing())
    pairs = [pictures[i] for i in range(len(pictures))]
    images = torch.stack([image for image, _ in pairs]).mul(255).round().byte().numpy()
    return images, np.array([int(label) for _, label in pairs])


def _optimizer(network: str, model: nn.Module) -> tuple[torch.optim.Optimizer, float]:
    """What suits a kind of network, and its largest rate."""
    if network == "mobile":
        return torch.optim.SGD(
            model.parameters(), momentum=0.9, nesterov=True, weight_decay=5e-4, lr=0.1
        ), 0.1
    return torch.optim.AdamW(model.parameters(), weight_decay=0.05, lr=1e-3), 1e-3


def _learn(network: str, model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Train with a one-cycle schedule on mirrored and shifted images."""
    size, batch = len(images), 128
    optimizer, rate = _optimizer(network, model)
    steps = epochs * (size // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    model.train()
    for _ in tqdm(range(epochs), unit="epoch"):
        for chosen in torch.randperm(size)[: size // batch * batch].split(batch):
            top, left = torch.randint(0, 9, (2, len(chosen))).tolist()
            cut = [
                padded[i, :, y : y + 32, x : x + 32]
                for i, y, x in zip(chosen.tolist(), top, left, strict=True)
            ]
            shown = torch.stack(cut)
            mirrored = torch.rand(len(shown)) < 0.5
            shown = torch.where(mirrored[:, None, None, None], shown.flip(3), shown)
            shown = shown.to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=network != "mobile"):
                result = model(shown)
            loss = F.cross_entropy(result.float(), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@click.group()
def main() -> None:
    """Train a network, and compress it."""


@main.command()
@click.argument("network", type=click.Choice(list(NETWORKS)))
@click.option("--shared", type=click.Path(path_type=Path), default=HERE.parents[3] / "shared")
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--epochs", default=18)
def train(network: str, shared: Path, output: Path, epochs: int) -> None:
    """Train the network, and leave its images beside it."""
    output.mkdir(parents=True, exist_ok=True)
    images, labels = _arrays(shared / "data/cifar10/train")
    order = np.random.default_rng(0).permutation(len(images))
    sets = {
        "unseen": (images[order[:UNSEEN]], labels[order[:UNSEEN]]),
        "learnt": (images[order[UNSEEN:]], labels[order[UNSEEN:]]),
        "test": _arrays(shared / "data/cifar10/test"),
    }
    for name, (pictures, classes) in sets.items():
        np.savez_compressed(output / f"{name}.npz", images=pictures, labels=classes)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    torch.manual_seed(0)
    model = NETWORKS[network]().to(memory_format=torch.channels_last)
    inputs = (torch.from_numpy(sets["learnt"][0]).float() / 255 - mean) / std
    _learn(network, model, inputs, torch.from_numpy(sets["learnt"][1]), epochs)
    write_atomically(
        output / "weights.safetensors",
        save(model.to(memory_format=torch.contiguous_format).state_dict()),
    )


@main.command()
@click.argument("network", type=click.Choice(list(NETWORKS)))
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--macs", default="0.8,0.65,0.5", help="Budgets of MACs.")
@click.option("--seed", default="0")
@click.option("--test", default="test", help="Images to judge by: test or unseen.")
def sweep(network: str, output: Path, macs: str, seed: str, test: str) -> None:
    """Compress it to each budget with the defaults, on 2,000 of the images that it learned from."""
    result = output / f"sweep-{test}-{seed}"
    mean, std = (",".join(map(str, values)) for values in (MEAN, STD))
    sys.exit(
        cli.main(
            [
                "sweep", str(output / "weights.safetensors"), "--model", f"{HERE}:{network}",
                "--data", f"tensors:{output / 'learnt.npz'}",
                "--test", f"tensors:{output / test}.npz", "--mean", mean, "--std", std,
                "--calibration-images", "2000", "--seed", seed, "--macs", macs, "--no-latency",
                "--output", str(result),
            ],
            standalone_mode=False,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
