"""Sums over outputs that come in batches: how far they spread, and how far others are from them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.result import MeasuredError


@dataclass
class Spread:
    """Running sums of values ``[batch, channels, ...]`` by channel, in float64."""

    elements: int = 0
    rows: int = 0
    # By channel, from the first batch on.
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def see(self, values: Tensor) -> None:
        """Add a batch."""
        rows = (values if values.dim() > 1 else values.unsqueeze(1)).double()
        rows = rows.transpose(0, 1).flatten(1)
        if self.elements and len(rows) != len(self.total):
            # Another number of channels, as of maps whose size is the image's: all count as one.
            rows = rows.reshape(1, -1)
            self.total, self.squares = self.total.sum().view(1), self.squares.sum().view(1)
            self.rows = self.elements
        self.total = rows.sum(1) + self.total
        self.squares = (rows**2).sum(1) + self.squares
        self.rows += rows.shape[1]
        self.elements += rows.numel()

    def variance(self) -> float:
        """Mean over the channels of the values' variance."""
        mean = self.total / self.rows
        found = float((self.squares / self.rows - mean**2).mean())
        # What cancellation leaves of a constant output is not variance.
        return found if found > 1e-12 * float((mean**2).mean()) else 0.0

    def error(self, squared: float, elements: int) -> MeasuredError:
        """A sum of squared differences over so many elements, as an error beside the variance."""
        mse, variance = squared / elements, self.variance()
        return MeasuredError(mse, mse / variance if variance > 1e-20 else None)


def squared_error(output: Tensor, reference: Tensor) -> float:
    """The sum of squared differences, in float64."""
    return float(((output - reference).double() ** 2).sum())
