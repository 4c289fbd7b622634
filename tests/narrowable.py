"""Small networks whose channels belong together in ways that are known, and their statistics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.calibrate.collect import calibrate
from compress.calibrate.recipe import Recipe
from compress.calibrate.removal import Narrower, readers_of
from compress.calibrate.statistics import Source
from compress.choose.choices import make_choice
from compress.config import WAYS
from compress.network.baseline import Network, prepare
from compress.network.narrowing import widths_at
from compress.plan import DENSE, NARROW, Plan


class Mobile(nn.Module):
    """Expand, depthwise, squeeze-and-excite, project, with a shortcut over it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.expand = nn.Conv2d(6, 12, 1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.squeeze = nn.Conv2d(12, 4, 1)
        self.excite = nn.Conv2d(4, 12, 1)
        self.project = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.silu(self.depthwise(F.relu6(self.norm(self.expand(x)))))
        scale = y.mean((2, 3), keepdim=True)
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(scale))))
        x = x + self.project(y)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Joined(nn.Module):
    """A concatenation of two branches, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.both = nn.Conv2d(10, 8, 3, stride=2, padding=1, padding_mode="reflect")
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.left(x)), F.gelu(self.right(x))], 1)
        x = F.max_pool2d(F.relu(self.both(self.norm(x))), 2)
        return self.head(x.view(x.size(0), -1))


class Tokens(nn.Module):
    """A transformer's two-layer perceptron over tokens, with a norm over all features."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


class Chain(nn.Module):
    """Layers one after the other: each in the middle is read and made narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.PReLU(8), nn.Conv2d(8, 10, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(10, 8, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(8, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Upscaled(nn.Module):
    """A transposed convolution, an interpolation and a sum of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 8, 2, stride=2)
        self.side = nn.Conv2d(3, 8, 1)
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.down(x), 0.1)
        return self.out(F.hardswish(self.up(y) + self.side(x)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mobile": (Mobile, (3, 8, 8)),
    "joined": (Joined, (3, 16, 16)),
    "tokens": (Tokens, (8, 4, 4)),
    "chain": (Chain, (3, 8, 8)),
    "upscaled": (Upscaled, (3, 8, 8)),
}


def prepared(name: str) -> tuple[Network, Tensor]:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    images = torch.randn(3, *shape)
    return prepare(model, images[:1]), images


def in_float64(network: Network) -> None:
    """Put a network into float64, its channels read before."""
    assert network.channels is not None
    network.model.double()


def smooth(count: int, shape: tuple[int, ...], seed: int = 1) -> Tensor:
    """Images whose neighbouring pixels are alike."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, shape[0], 4, 4, generator=generator)
    return F.interpolate(coarse, size=shape[1:], mode="bilinear")


def recipe_of(network: Network, **settings: object) -> Recipe:
    """What a run takes statistics by that may take channels out."""
    return Recipe(schemes=WAYS, readers=readers_of(network), **settings)  # type: ignore[arg-type]


def narrower_of(network: Network, images: Tensor, **settings: object) -> Narrower:
    """What takes channels out of a network, with statistics of some images."""
    batches = [(images, torch.zeros(len(images), dtype=torch.long))]
    recipe = recipe_of(network, **settings)
    found = calibrate(network.model, network.sites, batches, Source(len(images)), recipe)
    return Narrower(network.model, network.sites, network.channels, found)


def plan_of(
    network: Network,
    widths: Mapping[str, int],
    ranks: Mapping[str, tuple[str, tuple[int, ...]]] = {},
    locked: Collection[str] = (),
) -> Plan:
    """A plan by hand.

    Args:
        network: The network.
        widths: Of some groups.
        ranks: Scheme and ranks of some layers.
        locked: Layers that stay as they are.
    """
    wide = {w.name: w for w in widths_at(network.model, network.channels, widths)}
    choices = []
    for site in network.sites:
        width = wide.get(site.name)
        scheme, taken = ranks.get(site.name, (NARROW if width else DENSE, ()))
        io = None if width is None else (width.inputs, width.outputs)
        choice = make_choice(site, scheme, taken, "by hand", 0, io)
        choices.append(replace(choice, locked=site.name in locked))
    return Plan("macs", 0.5, "loss", tuple(choices))
