"""Symmetric eigenproblems: eigenbases and shrinkage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues in descending order, never negative, with their eigenvectors in columns.

    Attributes:
        eigenvalues: ``[groups, n]``.
        eigenvectors: ``[groups, features, n]``.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor


def eigenbasis(matrix: Tensor) -> Spectrum:
    """Decompose symmetric positive semi-definite matrices ``[groups, n, n]``."""
    values, vectors = torch.linalg.eigh(matrix)
    return Spectrum(values.flip(-1).clamp_min(0.0), vectors.flip(-1))


def tail_of(eigenvalues: Tensor) -> Tensor:
    """Sum of all groups' descending eigenvalues ``[groups, n]`` beyond each rank, ``[n + 1]``."""
    total = eigenvalues.sum(0)
    return torch.cat([total.flip(0).cumsum(0).flip(0), total.new_zeros(1)])


def regularise(weighting: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Add ``epsilon`` of the mean eigenvalue to the diagonal; the identity where it is all zero.

    An output weighting ``E[g gᵀ]`` is always singular at the logits and on dead channels. The mean
    is over all groups: a group that nothing reads must not weigh more than one that is read.

    Args:
        weighting: ``[groups, n, n]``, the diagonal blocks of one matrix.
        epsilon: In parts of the mean eigenvalue.
    """
    eye = torch.eye(weighting.shape[-1], dtype=weighting.dtype, device=weighting.device)
    mean = weighting.diagonal(dim1=-2, dim2=-1).mean()
    return torch.where(mean > 0, weighting + epsilon * mean * eye, eye)


def shrinkage(covariance: Tensor, samples: int) -> float:
    """Return the weight of the scaled identity in a shrunk covariance.

    Oracle Approximating Shrinkage (Chen, Wiesel, Eldar & Hero, "Shrinkage Algorithms for MMSE
    Covariance Estimation", 2010, eq. 23), which needs the covariance alone and is never worse
    than Ledoit-Wolf for Gaussian rows.

    Args:
        covariance: ``[groups, n, n]``, the sample covariance.
        samples: Rows that it was estimated from.
    """
    n = covariance.shape[-1]
    if n == 1 or samples < 1:
        return 0.0
    squared = (covariance**2).sum((-2, -1)).mean()
    trace_squared = (covariance.diagonal(dim1=-2, dim2=-1).sum(-1) ** 2).mean()
    if float(trace_squared) == 0.0:
        return 0.0
    numerator = (1 - 2 / n) * squared + trace_squared
    denominator = (samples + 1 - 2 / n) * (squared - trace_squared / n)
    return 1.0 if float(denominator) <= 0 else min(1.0, float(numerator / denominator))


def shrink(covariance: Tensor, weight: float) -> Tensor:
    """Mix ``weight`` of the identity, scaled to the same trace, into a covariance."""
    shrunk = (1 - weight) * covariance
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    shrunk.diagonal(dim1=-2, dim2=-1).add_(weight * scale)
    return shrunk
