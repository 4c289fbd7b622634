"""Whether paired samples come from one distribution."""

from __future__ import annotations

import torch
from torch import Tensor


def energy_distance(first: Tensor, second: Tensor) -> float:
    """How far two distributions are apart, of which each pair is a sample.

    This is ``2 E|x - y| - E|x - x'| - E|y - y'|`` (Székely and Rizzo, "Energy statistics", 2013)
    relative to ``E|x - x'|``: 0 for the same distribution, whatever the two of a pair have to do
    with each other, as a sample is only compared with those of other pairs. Every dimension counts
    relative to its spread in the first, those without any not at all.

    Args:
        first: ``[pairs, dimensions]``, two pairs at least.
        second: The same shape.
    """
    x, y = first.double(), second.double()
    spread = x.std(0)
    counted = spread > 0
    if not bool(counted.any()):
        return 0.0 if torch.equal(x, y) else torch.inf
    mean = x.mean(0)
    x, y = (((t - mean) / spread)[:, counted] for t in (x, y))
    within, across, after = (_mean_distance(a, b) for a, b in ((x, x), (x, y), (y, y)))
    return (2 * across - within - after) / within


def _mean_distance(x: Tensor, y: Tensor) -> float:
    """The mean distance of samples of different pairs."""
    distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    count = len(x)
    return float((distances.sum() - distances.diagonal().sum()) / (count * (count - 1)))
