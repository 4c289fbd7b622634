"""Small networks whose channels can be taken out, for ``[B, 1, 8, 8]``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mobile(nn.Module):
    """A stem, two inverted residuals, one with a shortcut, and a head, all with norms."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.first = _inverted(8, 16, 8)
        self.second = _inverted(8, 20, 12)
        self.head = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = x + self.first(x)
        x = self.second(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _inverted(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
        nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
        nn.BatchNorm2d(hidden), nn.ReLU6(),
        nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
    )  # fmt: skip


def vgg() -> nn.Module:
    """Layers one after the other; a norm that cannot be folded, slopes of each channel."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(12),
        nn.Conv2d(12, 16, 3, padding=1), nn.PReLU(16), nn.MaxPool2d(2),
        nn.Conv2d(16, 20, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(80, 24), nn.ReLU(), nn.Linear(24, 3),
    )  # fmt: skip


def without_biases() -> nn.Module:
    """Layers that read channels and have no bias, and no norm behind them to get one from."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 20, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(80, 24, bias=False), nn.ReLU(), nn.Linear(24, 3, bias=False),
    )  # fmt: skip


class Branching(nn.Module):
    """A network without a graph: its forward decides by what its images hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        if float(x.detach().sum()) > 1e9:
            x = x * 2
        return self.head(F.relu(self.second(x)).mean((2, 3)))


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a network weights and norms as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan = parameter[0].numel()
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) * (2 / fan) ** 0.5
                )
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) / 5)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def mobile(classes: int = 3) -> nn.Module:
    """Build `Mobile`."""
    return Mobile(classes)
