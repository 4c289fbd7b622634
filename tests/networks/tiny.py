"""A network small enough that a whole run of the command line takes a moment."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Tiny(nn.Module):
    """Two convolutions with a norm between them, and a linear head, for ``[B, 1, 8, 8]``."""

    def __init__(self, num_classes: int = 3, poison: bool = False) -> None:
        super().__init__()
        self.input_shape = (1, 8, 8)
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3)
        self.head = nn.Linear(12, num_classes)
        self.poison = poison

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(images)))
        if self.poison:
            # Overflows on bright images alone: the first, dark one passes.
            x = x + torch.where(images.mean() > 0.2, float("inf"), 0.0)
        x = torch.relu(self.conv2(x))
        return self.head(x.mean((2, 3)))


def tiny(num_classes: int = 3, poison: bool = False) -> Tiny:
    """Build the network with random weights."""
    return Tiny(num_classes, poison)


def sequence(outputs: int = 4) -> nn.Module:
    """A network that is not a classifier: it gives a map ``[B, outputs, 8, 8]``."""
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, outputs, 1))


def closeness(model: nn.Module, batches: object) -> float:
    """A metric for `sequence`: minus the mean absolute output."""
    total, images = 0.0, 0
    with torch.no_grad():
        for inputs, _ in batches:  # type: ignore[attr-defined]
            total += float(model(inputs.to(next(model.parameters()))).abs().mean()) * len(inputs)
            images += len(inputs)
    return -total / images


def squared(outputs: Tensor, labels: Tensor) -> Tensor:
    """A loss for `sequence`."""
    del labels
    return outputs.square().sum()
