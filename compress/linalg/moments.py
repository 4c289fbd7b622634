"""Streaming moments: count, mean and centred scatter, merged pairwise.

Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances" (1979). Everything that calibration learns from data passes through here. A regression
needs nothing else: it takes the moments of rows ``[x, y]`` put side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

# Rows are few where the features are more than so many times as many.
FEW_ROWS = 8
# How many columns of a symmetric product are computed at a time.
COLUMNS = 512


class Moments:
    """Count, mean and centred scatter of rows, per group, in float64.

    Attributes:
        count: Rows seen in each group.
        mean: ``[groups, features]``.
        scatter: ``[groups, features, features]``, the sum of centred outer products.
    """

    def __init__(self, groups: int, features: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(groups, features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(groups, features, features, dtype=torch.float64, device=device)

    def to(self, device: torch.device) -> Moments:
        """Return the same on a device."""
        found = copy.copy(self)
        found.mean, found.scatter = self.mean.to(device), self.scatter.to(device)
        return found

    @property
    def covariance(self) -> Tensor:
        """Centred population covariance ``[groups, features, features]``; zero before any row."""
        return self.scatter / max(self.count, 1)

    @property
    def second_moment(self) -> Tensor:
        """Uncentred second moment ``[groups, features, features]``."""
        mean = self.mean.unsqueeze(2)
        return torch.baddbmm(self.scatter, mean, mean.mT, beta=1 / max(self.count, 1))

    def taken_covariance(self) -> Tensor:
        """`covariance` in the memory of the scatter, after which no rows can be added."""
        found = self.scatter.div_(max(self.count, 1))
        self.scatter = found.new_empty(0)
        return found

    def update(self, rows: Tensor) -> None:
        """Add rows ``[groups, samples, features]``.

        Rows below float64 are centred on their own mean before the product is taken in float32,
        so that a large mean costs no precision; few long ones are taken in float64.
        """
        samples = rows.shape[1]
        if samples == 0:
            return
        rows = rows.detach()
        if rows.dtype in (torch.float16, torch.bfloat16):
            rows = rows.float()
        if samples * FEW_ROWS < rows.shape[2]:
            self._update_in_place(rows.double())
            return
        reference = rows.mean(dim=1, keepdim=True)
        centred = rows - reference
        scatter = gram(centred).double()
        # What float32 rounding left of the mean of the centred rows.
        residue = centred.mean(dim=1).double()
        scatter -= samples * residue.unsqueeze(2) * residue.unsqueeze(1)
        self._merge(samples, reference.squeeze(1).double() + residue, scatter)

    def _update_in_place(self, rows: Tensor) -> None:
        """Add a few long rows in one pass over the scatter, the shift of the mean as one more row.

        The product is small beside the matrices, which are what takes time and memory here.
        """
        samples = rows.shape[1]
        total = self.count + samples
        mean = rows.mean(dim=1)
        shift = mean - self.mean
        weight = (self.count * samples / total) ** 0.5
        stacked = torch.cat([rows - mean.unsqueeze(1), weight * shift.unsqueeze(1)], dim=1)
        self.scatter.baddbmm_(stacked.mT, stacked)
        self.mean = self.mean + shift * (samples / total)
        self.count = total

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        if total == 0:
            return
        shift = mean - self.mean
        self.scatter += scatter
        self.scatter += (self.count * count / total) * (shift.unsqueeze(2) * shift.unsqueeze(1))
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def is_finite(self) -> bool:
        """Whether everything seen so far was finite."""
        return bool(torch.isfinite(self.scatter.sum()) and torch.isfinite(self.mean.sum()))

    def any(self) -> bool:
        """Whether anything seen so far was not zero."""
        return bool(self.scatter.any() or self.mean.any())

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors, for safetensors."""
        return {
            "count": torch.tensor(self.count, dtype=torch.int64),
            "mean": self.mean.contiguous(),
            "scatter": self.scatter.contiguous(),
        }

    @classmethod
    def from_tensors(cls, state: Mapping[str, Tensor]) -> Moments:
        """Rebuild an accumulator from `tensors`."""
        moments = cls(state["mean"].shape[0], state["mean"].shape[1], state["mean"].device)
        moments.count = int(state["count"])
        moments.mean = state["mean"].clone()
        moments.scatter = state["scatter"].clone()
        return moments


def gram(rows: Tensor) -> Tensor:
    """Return ``rowsᵀ rows [groups, features, features]`` of ``[groups, samples, features]``.

    Of many features hardly more than the upper half is computed, and mirrored.
    """
    features = rows.shape[2]
    if features <= COLUMNS:
        return rows.mT @ rows
    found = rows.new_empty(len(rows), features, features)
    for group, product in zip(rows, found, strict=True):
        for start in range(0, features, COLUMNS):
            end = start + COLUMNS
            torch.mm(group[:, start:end].T, group[:, start:], out=product[start:end, start:])
            product[end:, start:end] = product[start:end, end:].T
    return found
