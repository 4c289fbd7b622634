"""Which channels a set of layers can best do without.

Taking the rows ``R`` of the inputs away from a layer with weight ``W`` and patches of covariance
``C``, and putting into the others what they can foretell of them, leaves ``W_S + W_R C_RS C_SS⁻¹``,
with the loss ``tr(G W_R H_RR⁻¹ W_Rᵀ)`` for ``H = C⁻¹``. Channels are taken out one by one, each
time the one whose loss is least, summed over all layers that read it (a channel's taps are one
block; backward elimination in the metric of the outputs: Hassibi & Stork, "Optimal Brain Surgeon",
1993; Kurtic et al., "ZipLM", 2023).

A channel's loss never falls while others go. So several can be taken at once, with one update of
the large matrices, as long as their losses, worked out among themselves, stay below that of the
first one left out: the order is that of one at a time.

Channels with nothing but linear operations on their way need not be taken as they are: rotated to
the principal directions of their data, in the metric of all that read them, the last directions go,
and what they told is put into the others as before. For one reader of the first directions alone
no others lose less (reduced-rank regression: Izenman, 1975); a stream of several is what SliceGPT
(Ashkboos et al., 2024) cuts, there without the metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.linalg.problem import solve_psd

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

# Channels looked at together, as a part of those that are left.
_BATCH = 1 / 10
# Matrices are made smaller once this part of them is left.
_SPARSE = 0.7
# What keeps a covariance of dependent channels invertible, in parts of its mean eigenvalue.
RIDGE = 1e-8


@dataclass(frozen=True)
class Reader:
    """A layer that reads the channels, in the metric of its data.

    Attributes:
        root: ``R W [out, d]`` for ``G = Rᵀ R``, scaled so that squares are losses.
        covariance: ``C [d, d]`` of its patches.
        columns: ``[channels, taps]``: where each channel lies in a patch.
    """

    root: Tensor
    covariance: Tensor
    columns: Tensor


@dataclass(frozen=True)
class Removal:
    """An order in which channels can go.

    Attributes:
        order: The first to go first, ``[channels]``.
        losses: ``losses[n]`` is the loss of all readers once ``n`` are gone, ``[channels]``; the
            last channel never goes.
        basis: Orthogonal ``[channels, channels]`` whose columns are the directions that are meant
            by channels; None where they are the channels themselves.
    """

    order: Tensor
    losses: Tensor
    basis: Tensor | None = None

    def stay(self, width: int) -> Tensor:
        """The channels that stay at a width, ascending."""
        return self.order[len(self.order) - width :].sort()[0]

    def loss(self, width: int) -> float:
        """The loss at a width."""
        return float(self.losses[len(self.order) - width])


def removal(readers: Sequence[Reader]) -> Removal:
    """Order the channels that some layers share by what taking them out costs."""
    states = [_State(reader) for reader in readers]
    left = torch.arange(len(readers[0].columns))
    order: list[int] = []
    losses = [0.0]
    while len(left) > 1:
        cost = np.sum([state.costs() for state in states], axis=0)
        ranked = cost.argsort(kind="stable")
        most = min(len(left) - 1, max(1, int(len(left) * _BATCH)))
        considered = ranked[:most]
        blocks = [state.block(considered) for state in states]
        taken, each = _one_by_one(blocks, float(cost[ranked[most]]))
        gone = considered[taken]
        for state in states:
            state.take(gone)
        order += left[gone].tolist()
        left = torch.from_numpy(np.delete(left.numpy(), gone))
        losses += (losses[-1] + np.cumsum(each)).tolist()
    order += left.tolist()
    return Removal(torch.tensor(order), torch.tensor(losses, dtype=torch.float64))


def removal_of_directions(readers: Sequence[Reader]) -> Removal:
    """Rotate the channels that some layers share to directions, and take the last ones first."""
    basis = _directions(readers)
    size = len(basis)
    losses = torch.zeros(size, dtype=torch.float64)
    for reader in readers:
        losses += _losses_along(reader, basis).cpu()
    return Removal(torch.arange(size).flip(0), losses, basis)


def _directions(readers: Sequence[Reader]) -> Tensor:
    """Orthogonal ``[channels, channels]``: the directions that tell the readers most come first."""
    size = len(readers[0].columns)
    device = readers[0].covariance.device
    metric = torch.zeros(size, size, dtype=torch.float64, device=device)
    covariance = torch.zeros_like(metric)
    for reader in readers:
        for columns in reader.columns.T.to(device):
            root = reader.root[:, columns].double()
            metric += root.mT @ root
            covariance += reader.covariance[columns][:, columns].double()
    values, vectors = torch.linalg.eigh(metric)
    half = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    # Of ``A (x - mean)`` with these rows, least squares foretell best what the readers see.
    rows = torch.linalg.eigh(half @ covariance @ half)[1].flip(1).mT @ half
    basis: Tensor = torch.linalg.qr(rows.mT)[0]
    return basis


def _losses_along(reader: Reader, basis: Tensor) -> Tensor:
    """The loss once the last ``n`` directions are gone, ``[channels]``.

    With the directions that go first in front, the Cholesky factor of their part of ``H`` holds
    those of all smaller parts, so one of it gives ``tr(W_R H_RR⁻¹ W_Rᵀ)`` for every ``n``.
    """
    columns = reader.columns.to(basis.device)
    size, taps = columns.shape
    own = columns.flatten()
    last = basis.flip(1)
    inverse = _inverse(reader.covariance.double())[own][:, own]
    turned = torch.einsum("cx,csdt,dy->xsyt", last, inverse.view(size, taps, size, taps), last)
    root = torch.einsum("ocs,cx->xso", reader.root[:, own].double().view(-1, size, taps), last)
    factor = torch.linalg.cholesky(_symmetric(turned.reshape(size * taps, size * taps)))
    solved = torch.linalg.solve_triangular(factor, root.reshape(size * taps, -1), upper=False)
    each = solved.square().sum(1).view(size, taps).sum(1)
    return torch.cat([each.new_zeros(1), each.cumsum(0)[:-1]])


class _State:
    """What is left of one reader, the taps of a channel side by side."""

    def __init__(self, reader: Reader) -> None:
        self.taps = reader.columns.shape[1]
        columns = reader.columns.flatten().to(reader.covariance.device)
        self.inverse = _inverse(reader.covariance[columns][:, columns].double())
        self.root = reader.root[:, columns].double()
        # Where the channels lie that are left; what is gone stays in the matrices for a while.
        self.slots = np.arange(len(reader.columns))

    def costs(self) -> Floats:
        """The loss of taking each channel, alone."""
        columns = self._columns(np.arange(len(self.slots))).reshape(-1, self.taps)
        each = self.inverse[columns.unsqueeze(2), columns.unsqueeze(1)]
        roots = self.root[:, columns].permute(1, 2, 0)
        grams = roots @ roots.mT
        if self.taps == 1:
            ratios: Floats = (grams / each).flatten().cpu().numpy()
            return ratios
        solved = torch.linalg.solve(each, grams)
        traces: Floats = solved.diagonal(dim1=1, dim2=2).sum(1).cpu().numpy()
        return traces

    def block(self, channels: Indices) -> tuple[Floats, Floats]:
        """Among some channels, ``H`` and the root's Gram matrix, ``[n, taps, n, taps]``."""
        columns = self._columns(channels)
        shape = (len(channels), self.taps) * 2
        root = self.root[:, columns]
        found = (self.inverse[columns.unsqueeze(1), columns], root.mT @ root)
        inverse, gram = (matrix.cpu().clone().numpy().reshape(shape) for matrix in found)
        return inverse, gram

    def take(self, channels: Indices) -> None:
        """Take channels out."""
        columns = self._columns(channels)
        rows = self.inverse[columns]
        factor = torch.linalg.cholesky(_symmetric(rows[:, columns]))
        lost = torch.cholesky_solve(self.root[:, columns].mT, factor).mT
        self.root.addmm_(lost, rows, alpha=-1)
        half = torch.linalg.solve_triangular(factor, rows, upper=False)
        self.inverse.addmm_(half.mT, half, alpha=-1)
        self.slots = np.delete(self.slots, channels)
        if len(self.slots) * self.taps < _SPARSE * len(self.inverse):
            stay = self._columns(np.arange(len(self.slots)))
            self.inverse = self.inverse[stay.unsqueeze(1), stay]
            self.root = self.root[:, stay]
            self.slots = np.arange(len(self.slots))

    def _columns(self, channels: Indices) -> Tensor:
        first = torch.from_numpy(self.slots[channels]) * self.taps
        columns = (first.unsqueeze(1) + torch.arange(self.taps)).flatten()
        return columns.to(self.inverse.device)


def _inverse(covariance: Tensor) -> Tensor:
    scale = float(covariance.diagonal().mean())
    ridge = RIDGE * scale if scale > 0 else 1.0
    eye = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
    factor, info = torch.linalg.cholesky_ex(covariance + ridge * eye)
    while bool(info):
        if not ridge < 1e3 * (scale + 1):
            raise ValueError("a covariance that is not finite cannot be factored")
        ridge *= 10
        factor, info = torch.linalg.cholesky_ex(covariance + ridge * eye)
    return torch.cholesky_inverse(factor)


def _one_by_one(blocks: list[tuple[Floats, Floats]], bound: float) -> tuple[list[int], list[float]]:
    """Take channels of a block one by one until the next costs more than ``bound``."""
    alive = np.arange(blocks[0][0].shape[0])
    taken: list[int] = []
    losses: list[float] = []
    while len(alive):
        cost = np.sum([_costs(*block, alive) for block in blocks], axis=0)
        place = int(cost.argmin())
        if taken and cost[place] > bound:
            break
        channel = int(alive[place])
        alive = np.delete(alive, place)
        taken.append(channel)
        losses.append(max(float(cost[place]), 0.0))
        for inverse, gram in blocks:
            _take(inverse, gram, channel)
    return taken, losses


def _costs(inverse: Floats, gram: Floats, channels: Indices) -> Floats:
    own = inverse[channels, :, channels, :]
    grams = gram[channels, :, channels, :]
    if own.shape[1] == 1:
        return np.asarray((grams / own)[:, 0, 0])
    return np.asarray(np.trace(np.linalg.solve(own, grams), axis1=1, axis2=2))


def _take(inverse: Floats, gram: Floats, channel: int) -> None:
    """Take a channel out of a block, in place."""
    shape = inverse.shape
    taps, flat = shape[1], shape[0] * shape[1]
    own = slice(channel * taps, (channel + 1) * taps)
    h, m = inverse.reshape(flat, flat), gram.reshape(flat, flat)
    rows = h[own].copy()
    solved = np.linalg.solve(rows[:, own], rows)
    crossed = m[:, own] @ solved
    m -= crossed + crossed.T - solved.T @ m[own, own] @ solved
    h -= rows.T @ solved


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def compensated(weight: Tensor, covariance: Tensor, stay: Tensor) -> Tensor:
    """Return the weight ``[out, d]`` that looks only at some columns and foretells the others.

    Args:
        weight: ``W [out, d]``.
        covariance: ``C [d, d]``.
        stay: The columns that stay, ascending.
    """
    padded = covariance.double().clone()
    scale = padded.diagonal().mean()
    padded.diagonal().add_(torch.where(scale > 0, RIDGE * scale, torch.ones_like(scale)))
    right = (weight.double() @ padded)[:, stay]
    found = torch.zeros_like(weight, dtype=torch.float64)
    inside = padded[stay][:, stay]
    found[:, stay] = solve_psd(inside.unsqueeze(0), right.unsqueeze(0))[0]
    return found
