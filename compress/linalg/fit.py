"""Fits of factors in the data's own metric.

Every scheme approximates a weight ``W [out, d]`` by a structured ``Ŵ`` so that
``tr(G (W - Ŵ) C (W - Ŵ)ᵀ)`` is least, with ``C`` the covariance of the patches and ``G`` the
weighting of the outputs. ``output`` has a closed form (reduced-rank regression: Izenman 1975); the
others alternate between two factors. See `compress.linalg.schemes` for the factors' shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.linalg.alternation import Alternation
from compress.linalg.balance import balance, balance_three
from compress.linalg.geometry import Geometry
from compress.linalg.grid import grid_losses, rank_grid
from compress.linalg.problem import Covariances, Problem, Split, combine_factors
from compress.linalg.schemes import OUTPUT, Ranks, scheme_named

__all__ = [
    "Covariances",
    "Fit",
    "Problem",
    "chain_matrix",
    "fit",
    "grid_losses",
    "rank_grid",
    "refine",
    "takes_no_rounds",
    "with_weights",
]

# The eigenvectors of a closed form take the cube of a layer's width: a minute at 4,096.
WIDE = 1000


@dataclass(frozen=True)
class Fit:
    """Factors of one layer with their errors.

    Attributes:
        scheme: The scheme's name.
        ranks: Ranks per group.
        weights: One ``[groups, out, in, *kernel]`` per stage, float64, without bias.
        loss: ``tr(G Δ C Δᵀ)`` summed over the groups.
        mse: ``tr(Δ C Δᵀ) / c_out``: mean squared error per output element.
        matrix: ``Ŵ [groups, out, d]``.
        projection: For ``output``, ``P [groups, out, out]`` with ``Ŵ = P W``.
    """

    scheme: str
    ranks: Ranks
    weights: tuple[Tensor, ...]
    loss: float
    mse: float
    matrix: Tensor
    projection: Tensor | None = None


def fit(
    problem: Problem, scheme: str, ranks: Ranks, iterations: int = 12, warm: Fit | None = None
) -> Fit:
    """Fit one scheme at given ranks (per group, clipped to full).

    Args:
        problem: The layer in its data's metric.
        scheme: A name of `compress.linalg.schemes.SCHEME_NAMES`.
        ranks: One rank, or ``(r1, r2)`` for ``two_sided``.
        iterations: Rounds of alternating least squares at most; 0 for only the start.
        warm: A fit of the same scheme at ranks no larger, to begin from as well. The alternation
            finds local optima; the error is no larger than that of ``warm``, where two fits that
            know nothing of each other may differ either way by a little.

    Returns:
        The factors, balanced, with the exact errors of this fit.

    Raises:
        ValueError: A rank below 1, too few or too many of them, or an unknown scheme.
    """
    made = scheme_named(scheme)
    limits = made.full_ranks(problem.geometry)
    if len(ranks) != len(limits) or min(ranks) < 1:
        raise ValueError(
            f"{scheme} takes {len(limits)} positive whole rank(s), and got {tuple(ranks)}"
        )
    ranks = tuple(min(r, limit) for r, limit in zip(ranks, limits, strict=True))
    if made.closed_form:
        return _fit_output(problem, ranks[0])
    if ranks == limits:
        return _exact(problem, scheme, ranks)
    split = problem.split(scheme)
    starts = _starts(problem, split, ranks[0])
    if warm is not None:
        starts.append(_extended(split, warm, ranks[0]))
    second = ranks[1] if made.cored else None
    best = min((Alternation(split, start, second) for start in starts), key=Alternation.error)
    if ranks[0] < limits[0]:
        best.run(iterations)
    return _finish(problem, scheme, ranks, best)


def refine(problem: Problem, warm: Fit, iterations: int) -> Fit:
    """Alternate further from given factors, under another target or metric.

    With ``iterations`` 0 only the last factor (for ``two_sided``: the last two) is solved; a fit
    that `takes_no_rounds` is always whole.
    """
    scheme, ranks = warm.scheme, warm.ranks
    made = scheme_named(scheme)
    at_once = takes_no_rounds(problem.geometry, scheme) or (made.closed_form and iterations)
    if at_once or ranks == made.full_ranks(problem.geometry):
        return fit(problem, scheme, ranks)
    split = problem.split(scheme)
    second = ranks[1] if made.cored else None
    run = Alternation(split, warm.weights[0].flatten(2).to(split.dtype), second)
    run.run(iterations)
    return _finish(problem, scheme, ranks, run)


def takes_no_rounds(geometry: Geometry, scheme: str) -> bool:
    """Whether a whole fit has a closed form that takes little more than solving the last factor."""
    return scheme_named(scheme).closed_form and geometry.full_rank <= WIDE


def with_weights(geometry: Geometry, old: Fit, weights: tuple[Tensor, ...]) -> Fit:
    """Return a fit with other factors of the same shapes, balanced; its errors are not known.

    Args:
        geometry: The layer that the chain replaces.
        old: Scheme and ranks.
        weights: One ``[groups, out, in, *kernel]`` per stage.
    """
    first, last = weights[0].flatten(2), weights[1].flatten(3)
    up = weights[2].flatten(2) if len(weights) > 2 else None
    balanced = _balanced_stages(geometry, old.scheme, first, last, up)
    matrix = chain_matrix(geometry, old.scheme, balanced)
    return Fit(old.scheme, old.ranks, balanced, math.nan, math.nan, matrix)


def _starts(problem: Problem, split: Split, rank: int) -> list[Tensor]:
    """First factors to begin from: the whitened SVD and, for pointwise ones, input PCA.

    The latter with and without the mean's own direction among its rows.
    """
    starts = [split.start[:, :rank]]
    if split.outer > 1 and split.inner == problem.geometry.in_channels // problem.geometry.groups:
        starts.append(split.components[:, :rank])
        with_mean = split.components_and_mean(rank)
        starts += [] if with_mean is None else [with_mean]
    return starts


def _extended(split: Split, warm: Fit, rank: int) -> Tensor:
    """Rows of an earlier fit, and the best of the start's beside them."""
    rows = warm.weights[0].flatten(2).to(split.dtype)[:, :rank]
    return torch.cat([rows, split.start[:, : rank - rows.shape[1]]], dim=1)


def _fit_output(problem: Problem, rank: int) -> Fit:
    """Fit the ``output`` scheme in closed form: PCA of ``R C Rᵀ`` for ``G = Rᵀ R``.

    The weighted error on the rows seen is the tail of the spectrum; the plain mean squared error
    is ``Σ_{i>r} λ_i |R⁻¹ u_i|² / c_out``.
    """
    geometry = problem.geometry
    if rank >= geometry.full_rank:
        return _exact(problem, OUTPUT.name, (rank,))
    spectrum = problem.spectrum
    basis = spectrum.eigenvectors[:, :, :rank]
    rest = spectrum.eigenvectors[:, :, rank:]
    seen = basis.mT if problem.plain else basis.mT @ problem.roots[0]
    first = seen @ problem.matrix
    up, left_over = (
        (basis, rest) if problem.plain else (problem.roots[1] @ b for b in (basis, rest))
    )
    weights = OUTPUT.stage_weights(geometry, *balance(first, up.unsqueeze(-1)))
    tail = spectrum.eigenvalues[:, rank:]
    mse = float((tail * (left_over**2).sum(1)).sum()) / geometry.out_channels
    return Fit(OUTPUT.name, (rank,), weights, float(tail.sum()), mse, up @ first, up @ seen)


def _exact(problem: Problem, scheme: str, ranks: Ranks) -> Fit:
    """Factor a weight without any loss at full rank, using only identities."""
    geometry, weight, made = problem.geometry, problem.weight, scheme_named(scheme)
    ordered = made.split_weight(weight)
    groups, out, outer, inner = ordered.shape

    def identity(size: int) -> Tensor:
        eye = torch.eye(size, dtype=torch.float64, device=weight.device)
        return eye.expand(groups, -1, -1)

    if inner <= out * outer:
        first, last = identity(inner), ordered.transpose(2, 3)
    else:
        first = ordered.reshape(groups, out * outer, inner)
        last = identity(out * outer).reshape(groups, out, outer, -1).transpose(2, 3)
    up = None
    if made.cored:
        rank = first.shape[1]
        if out <= rank * outer:
            up = identity(out)
        else:
            up = last.reshape(groups, out, rank * outer)
            last = identity(rank * outer).reshape(groups, -1, rank, outer)
    weights = _balanced_stages(geometry, scheme, first, last, up)
    return Fit(scheme, ranks, weights, 0.0, 0.0, problem.matrix, identity(out))


def _finish(problem: Problem, scheme: str, ranks: Ranks, run: Alternation) -> Fit:
    first, last, up = run.first.double(), run.last.double(), None
    if run.core is not None and run.up is not None:
        last, up = run.core.double(), run.up.double()
    weights = _balanced_stages(problem.geometry, scheme, first, last, up)
    matrix = chain_matrix(problem.geometry, scheme, weights)
    loss, mse = problem.errors(matrix)
    return Fit(scheme, ranks, weights, loss, mse, matrix)


def _balanced_stages(
    geometry: Geometry, scheme: str, first: Tensor, last: Tensor, up: Tensor | None
) -> tuple[Tensor, ...]:
    if up is None:
        first, last = balance(first, last)
    else:
        first, last, up = balance_three(first, last, up)
    return tuple(
        w.contiguous() for w in scheme_named(scheme).stage_weights(geometry, first, last, up)
    )


def chain_matrix(geometry: Geometry, scheme: str, weights: tuple[Tensor, ...]) -> Tensor:
    """``Ŵ [groups, out, d]`` of a chain's stage weights."""
    first = weights[0].flatten(2)
    last = weights[1].flatten(3)
    made = scheme_named(scheme)
    if made.cored:
        last = torch.einsum("gpc,gcro->gpro", weights[2].flatten(2), last)
    return made.joined(geometry, combine_factors(first, last))
