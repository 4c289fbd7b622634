"""Predicted losses over a grid of ranks, from one factorisation a scheme.

The first factors of a grid are nested (the leading rows of one start), so that the losses with
the last factor solved at every rank come from a single Cholesky factorisation: each further row
adds its own independent share of the explained loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.linalg.alternation import Alternation
from compress.linalg.problem import Problem, Split, cholesky_psd
from compress.linalg.schemes import Ranks, scheme_named
from compress.linalg.spectrum import tail_of

_SECOND_RANKS = 24


def rank_grid(limit: int, points: int) -> list[int]:
    """Ranks from 1 to ``limit``, all of them where few, else about ``points`` of them.

    Half the grid is spaced evenly and half in proportion, since small ranks differ most.
    """
    if limit <= points:
        return list(range(1, limit + 1))
    half = max(points // 2, 1)
    steps = max(points - half - 1, 1)
    even = {max(1, round(limit * i / half)) for i in range(1, half + 1)}
    proportional = {max(1, round(limit ** (i / steps))) for i in range(steps)}
    return sorted(even | proportional)


def grid_losses(
    problem: Problem,
    scheme: str,
    ranks: list[int],
    iterations: int = 0,
    second: int | None = None,
) -> dict[Ranks, float]:
    """Predicted loss of a scheme over a grid of ranks, never rising with any rank.

    ``output`` is exact at every rank of the grid; the others solve the last factor at each rank
    of the whitened SVD start, so that a `fit` there does at least as well.

    Args:
        problem: The layer in its data's metric.
        scheme: The scheme's name.
        ranks: Ascending; for ``two_sided`` first ranks, each of which gives a grid of second ones.
        iterations: Rounds of alternation at each rank, begun from the rank before.
        second: The second rank of ``two_sided``, in place of a grid.

    Returns:
        ``tr(G Δ C Δᵀ)`` by ranks.
    """
    made = scheme_named(scheme)
    if made.closed_form:
        tail = tail_of(problem.eigenvalues)
        return {(r,): float(tail[r]) for r in ranks}
    if not ranks:  # no rank of a small layer saves
        return {}
    limits = made.full_ranks(problem.geometry)
    split = problem.split(scheme)
    shares = _alternated(split, ranks, iterations) if iterations else _nested(split, ranks)
    losses: dict[Ranks, float] = {}
    for rank, (base, explained) in zip(ranks, shares, strict=True):
        if not made.cored:
            losses[(rank,)] = base
            continue
        tail = tail_of(torch.linalg.eigvalsh(explained).flip(-1).clamp_min(0.0))
        for other in rank_grid(limits[1], _SECOND_RANKS) if second is None else [second]:
            losses[(rank, other)] = base + float(tail[other])
    return losses


def _nested(split: Split, ranks: list[int]) -> list[tuple[float, Tensor]]:
    """Loss at each rank, and the explained ``R Ŵ C Ŵᵀ Rᵀ [groups, out, out]``.

    Nothing is computed beyond the last rank of the grid, which is far from the full one where only
    ranks that save are looked at.
    """
    most = ranks[-1]
    first = split.start[:, :most]
    _, gram = split.project(first)
    # From taps of rows to rows of taps, so that a smaller rank is a leading block.
    order = torch.arange(gram.shape[-1], device=gram.device).reshape(split.outer, most).T.flatten()
    scale, factor = cholesky_psd(gram[:, order][:, :, order])
    pulled = (split.pulled_weight @ first.unsqueeze(1).mT).flatten(2)[:, :, order]
    weighted = split.problem.roots[0].to(split.dtype) @ pulled
    white = torch.linalg.solve_triangular(factor, weighted.mT * scale, upper=False).mT
    shares = white.square().double().sum((0, 1)).reshape(most, split.outer).sum(1).cumsum(0)
    total = split.loss_of_nothing()
    result, explained, done = [], white.new_zeros(()), 0
    for rank in ranks:
        block = white[:, :, done * split.outer : rank * split.outer]
        explained = explained + block @ block.mT
        done = rank
        # Where nothing is left to explain, rounding may leave less than that.
        result.append((max(total - float(shares[rank - 1]), 0.0), explained.double()))
    return result


def _alternated(split: Split, ranks: list[int], iterations: int) -> list[tuple[float, Tensor]]:
    """As `_nested`, with every rank's factors improved from the rank before."""
    result = []
    rows, lowest = split.start[:, :0], float("inf")
    for rank in ranks:
        rows = torch.cat([rows, split.start[:, rows.shape[1] : rank]], dim=1)
        run = Alternation(split, rows)
        run.run(iterations)
        rows = run.first
        lowest = min(lowest, max(run.error(), 0.0))
        result.append((lowest, run.explained().double()))
    return result
