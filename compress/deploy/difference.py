"""How far the numbers of an exported network are from the original's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Difference:
    """A tensor beside what it should be, over any number of batches.

    Where one number is not finite and the other is another, the difference is infinite.
    """

    furthest: float = 0.0
    size: float = 0.0
    apart: float = 0.0
    total: float = 0.0

    def add(self, expected: Tensor, found: Tensor) -> None:
        """See a batch of both, of the same shape."""
        if not expected.numel():
            return
        expected, found = expected.detach().double().cpu(), found.detach().double().cpu()
        same = (expected == found) | (expected.isnan() & found.isnan())
        apart = torch.where(same, 0.0, (expected - found).abs())
        apart = torch.where(apart.isnan(), math.inf, apart)
        size = torch.where(expected.isfinite(), expected.abs(), 0.0)
        self.furthest = max(self.furthest, float(apart.max()))
        self.size = max(self.size, float(size.max()))
        self.apart += float(apart.sum())
        self.total += float(size.sum())

    @property
    def largest(self) -> float:
        """The largest absolute difference by the largest absolute value."""
        return _relative(self.furthest, self.size)

    @property
    def mean(self) -> float:
        """The mean absolute difference by the mean absolute value."""
        return _relative(self.apart, self.total)


def _relative(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole and math.isfinite(part) else math.inf
