"""Fits of factors in the data's own metric.

Every scheme approximates a weight ``W [out, d]`` by a structured ``Ŵ`` so that
``tr(G (W - Ŵ) C (W - Ŵ)ᵀ)`` is least, with ``C`` the covariance of the patches and ``G`` the
weighting of the outputs. ``output`` has a closed form (reduced-rank regression: Izenman 1975); the
others alternate between a closed-form last factor and conjugate gradients on the first, whose
normal matrix is never formed. See `compress.linalg.schemes` for the factors' shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compress.linalg.geometry import Geometry
from compress.linalg.schemes import (
    Ranks,
    full_ranks,
    split_covariance,
    split_weight,
    stage_weights,
)
from compress.linalg.spectrum import Spectrum, eigenbasis, regularise, square_roots

# Beyond this patch length the alternating fits run in float32: half the memory and time.
FLOAT32_BEYOND = 1200


@dataclass(frozen=True)
class Fit:
    """Factors of one layer with their errors.

    Attributes:
        scheme: The scheme's name.
        ranks: Ranks per group.
        weights: One ``[groups, out, in, k_h, k_w]`` per stage, float64, without bias.
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


class Problem:
    """One layer's weight with the metric of its data.

    Args:
        geometry: The layer's geometry.
        weight: ``[groups, out, in, k_h, k_w]``.
        output_covariance: ``[groups, out, out]``.
        input_covariance: ``[groups, d, d]`` over patches; None where only ``output`` is wanted.
        weighting: ``G [groups, out, out]``; None for the plain mean squared error.
    """

    def __init__(
        self,
        geometry: Geometry,
        weight: Tensor,
        output_covariance: Tensor,
        input_covariance: Tensor | None = None,
        weighting: Tensor | None = None,
    ) -> None:
        self.geometry = geometry
        self.weight = weight.double()
        self.output_covariance = output_covariance
        self.input_covariance = input_covariance
        eye = torch.eye(geometry.out_features, dtype=torch.float64, device=weight.device)
        self.weighting = (
            eye.expand(geometry.groups, -1, -1) if weighting is None else regularise(weighting)
        )
        self._splits: dict[str, Split] = {}

    @cached_property
    def matrix(self) -> Tensor:
        """``W [groups, out, d]``."""
        return self.weight.flatten(2)

    @cached_property
    def roots(self) -> tuple[Tensor, Tensor]:
        """``G^½`` and ``G^-½``."""
        return square_roots(self.weighting)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Eigenbasis of ``G^½ C_y G^½``, at most ``full_rank`` of it."""
        root = self.roots[0]
        geometry = self.geometry
        if self.input_covariance is not None and geometry.in_features < geometry.out_features:
            # The smaller side: singular vectors of G^½ W C^½. A whisper of identity in C keeps
            # the basis spanning W's whole range where the data do not.
            covariance = self.input_covariance
            scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)
            eye = torch.eye(geometry.in_features, dtype=torch.float64, device=covariance.device)
            half = square_roots(covariance + 1e-12 * scale[:, None, None] * eye)[0]
            left, values, _ = torch.linalg.svd(root @ self.matrix @ half, full_matrices=False)
            return Spectrum(values**2, left)
        spectrum = eigenbasis(root @ self.output_covariance @ root)
        rank = geometry.full_rank
        return Spectrum(spectrum.eigenvalues[:, :rank], spectrum.eigenvectors[:, :, :rank])

    @cached_property
    def plain_spectrum(self) -> Tensor:
        """Eigenvalues ``[groups, full_rank]`` of the outputs' covariance, whatever the metric."""
        values = torch.linalg.eigvalsh(self.output_covariance).flip(-1).clamp_min(0.0)
        return values[:, : self.geometry.full_rank]

    def variance(self) -> float:
        """Mean variance per output element, what relative errors are relative to."""
        trace = self.output_covariance.diagonal(dim1=-2, dim2=-1).sum()
        return float(trace) / self.geometry.out_channels

    def errors(self, approximation: Tensor) -> tuple[float, float]:
        """Return the weighted loss and the mean squared error of ``Ŵ [groups, out, d]``."""
        if self.input_covariance is None:
            raise ValueError("the error of a general approximation needs the patches' covariance")
        delta = self.matrix - approximation
        gram = delta @ self.input_covariance.to(delta.dtype) @ delta.mT
        loss = float((self.weighting * gram).sum())
        plain = float(gram.diagonal(dim1=-2, dim2=-1).sum()) / self.geometry.out_channels
        return max(loss, 0.0), max(plain, 0.0)

    def split(self, scheme: str) -> Split:
        """The problem reordered for a scheme, cached."""
        key = "input" if scheme == "two_sided" else scheme
        if key not in self._splits:
            self._splits[key] = Split(self, key)
        return self._splits[key]

    def release(self) -> None:
        """Drop the cached reorderings, which are as large as the covariance."""
        self._splits.clear()


class Split:
    """A problem with its patch index split in ``outer`` and ``inner`` (see `schemes`)."""

    def __init__(self, problem: Problem, scheme: str) -> None:
        if problem.input_covariance is None:
            raise ValueError(f"the {scheme} scheme needs the patches' covariance")
        small = problem.geometry.in_features <= FLOAT32_BEYOND
        self.dtype = torch.float64 if small else torch.float32
        geometry = problem.geometry
        self.weight = split_weight(problem.weight, geometry, scheme).to(self.dtype)
        self.covariance = split_covariance(
            problem.input_covariance.to(self.dtype), geometry, scheme
        ).contiguous()
        self.weighting = problem.weighting.to(self.dtype)
        self.problem = problem
        self.groups, self.out, self.outer, self.inner = self.weight.shape

    @cached_property
    def inner_covariance(self) -> Tensor:
        """Mean over the outer taps of the covariance of the inner part ``[groups, n, n]``."""
        mean = self.covariance.diagonal(dim1=1, dim2=3).mean(-1).double()
        scale = mean.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)[:, None, None]
        eye = torch.eye(self.inner, dtype=torch.float64, device=mean.device)
        return mean + 1e-8 * scale * eye

    @cached_property
    def inner_inverse(self) -> Tensor:
        """Inverse of `inner_covariance`, the first factor's preconditioner."""
        return torch.linalg.inv(self.inner_covariance).to(self.dtype)

    @cached_property
    def start(self) -> Tensor:
        """Rows of the first factor in order of weight ``[groups, full, inner]``: whitened SVD."""
        half, inverse_half = square_roots(self.inner_covariance)
        root = self.problem.roots[0]
        tall = torch.einsum("gpc,gcon->gpon", root, self.weight.double()).flatten(1, 2) @ half
        basis = eigenbasis(tall.mT @ tall).eigenvectors
        return (basis.mT @ inverse_half).to(self.dtype)

    @cached_property
    def cov_flat(self) -> Tensor:
        """``[groups, outer * inner, outer, inner]`` as a matrix over the first index."""
        return self.covariance.reshape(self.groups, self.outer * self.inner, -1)


def combine_factors(first: Tensor, last: Tensor) -> Tensor:
    """``Ŵ [groups, out, outer, inner]`` of ``A [groups, r, n]`` and ``B [groups, out, r, o]``."""
    groups, out, rank, outer = last.shape
    flat = last.permute(0, 1, 3, 2).reshape(groups, out * outer, rank) @ first
    return flat.reshape(groups, out, outer, first.shape[-1])


def _solve_psd(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve ``X matrix = right`` for a positive semi-definite matrix with a hint of ridge."""
    scale = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)[:, None, None]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    ridge = 1e-11 if matrix.dtype == torch.float64 else 1e-6
    while True:
        factor, info = torch.linalg.cholesky_ex(matrix + ridge * scale * eye)
        if not bool(info.any()):
            return torch.cholesky_solve(right.mT, factor).mT
        ridge *= 100


class Alternation:
    """Alternating least squares for one split at one rank.

    Each step can only lower the error: the last factor is solved exactly (as a correction to
    itself, so that a singular system does no harm), the first by conjugate gradients from where
    it stands, preconditioned by the Kronecker product of the two factors' own Gram matrices.
    """

    def __init__(self, split: Split, first: Tensor, second_rank: int | None = None) -> None:
        self.split = split
        self.first = first
        self.second_rank = second_rank
        groups, rank, _ = first.shape
        self.last = first.new_zeros(groups, split.out, rank, split.outer)
        self.up: Tensor | None = None
        self.core: Tensor | None = None
        self.solve_last()

    def solve_last(self) -> None:
        """Solve the last factor for the first: regression, of reduced rank for ``two_sided``."""
        s = self.split
        self.first, triangle = _orthogonal_rows(self.first)
        self.last = torch.einsum("gcro,grk->gcko", self.last, triangle)
        groups, rank, inner = self.first.shape
        wide = s.outer * inner
        # C Mᵀ with M = A ⊗ I over the outer taps: [g, d, outer, r]
        projected = s.covariance.reshape(groups, wide * s.outer, inner) @ self.first.mT
        projected = projected.reshape(groups, wide, s.outer * rank)
        gram = self.first.unsqueeze(1) @ projected.reshape(groups, s.outer, inner, s.outer * rank)
        gram = gram.reshape(groups, s.outer * rank, s.outer * rank)
        gram = (gram + gram.mT) / 2
        delta = (s.weight - combine_factors(self.first, self.last)).flatten(2)
        change = _solve_psd(gram, delta @ projected)
        last = self.last.transpose(2, 3).flatten(2) + change  # [g, out, outer * r]
        if self.second_rank is not None:
            root, inverse = (m.to(s.dtype) for m in s.problem.roots)
            target = root @ last
            basis = eigenbasis(target @ gram @ target.mT).eigenvectors[:, :, : self.second_rank]
            core = basis.mT @ target
            self.up = inverse @ basis
            self.core = core.reshape(groups, -1, s.outer, rank).transpose(2, 3)
            last = self.up @ core
        self.last = last.reshape(groups, s.out, s.outer, rank).transpose(2, 3)

    def solve_first(self, steps: int) -> None:
        """Improve the first factor by ``steps`` preconditioned conjugate gradient steps."""
        s = self.split
        groups, rank, inner = self.first.shape
        weighted = torch.einsum("gcd,gdro->gcro", s.weighting, self.last)
        taps = torch.einsum("gcro,gcqp->gorpq", self.last, weighted)  # K: [g, o, r, p, q]
        taps = taps.reshape(groups, s.outer * rank, s.outer * rank)
        mean_tap = torch.einsum("gcro,gcqo->grq", self.last, weighted) + 1e-30 * torch.eye(
            rank, dtype=s.dtype, device=taps.device
        )

        def operator(a: Tensor) -> Tensor:
            # a C for every pair of taps, then K over (tap, rank): [g, r, inner]
            stretched = s.covariance.reshape(groups, s.outer, inner, s.outer * inner)
            moved = (a.unsqueeze(1) @ stretched).reshape(groups, s.outer, rank, s.outer, inner)
            k = taps.reshape(groups, s.outer, rank, s.outer, rank)
            return torch.einsum("gorpq,gpqoi->gri", k, moved)

        def precondition(a: Tensor) -> Tensor:
            return _solve_psd(mean_tap, a.mT).mT @ s.inner_inverse

        delta = (s.weight - combine_factors(self.first, self.last)).flatten(2)
        pulled = (delta @ s.cov_flat).reshape(groups, s.out, s.outer, inner)
        residual = torch.einsum("gcro,gcoi->gri", weighted, pulled)
        self.first = self.first + _conjugate_gradients(operator, precondition, residual, steps)

    def error(self) -> float:
        """Current ``tr(G Δ C Δᵀ)``."""
        s = self.split
        delta = (s.weight - combine_factors(self.first, self.last)).flatten(2)
        return float((s.weighting * ((delta @ s.cov_flat) @ delta.mT)).sum())

    def run(self, iterations: int, steps: int = 6, tolerance: float = 2e-3) -> None:
        """Alternate until the error falls by less than ``tolerance`` of itself."""
        error = self.error() if iterations else 0.0
        for _ in range(iterations):
            before = (self.first, self.last, self.up, self.core)
            self.solve_first(steps)
            self.solve_last()
            now = self.error()
            if now > error:  # rounding only, at convergence
                self.first, self.last, self.up, self.core = before
                return
            if now >= error * (1 - tolerance):
                return
            error = now


def _orthogonal_rows(first: Tensor) -> tuple[Tensor, Tensor]:
    """``A = T Q`` with orthonormal rows Q; returns Q and T, so that ``B A = (B T) Q``."""
    q, r = torch.linalg.qr(first.mT)
    return q.mT.contiguous(), r.mT


def _conjugate_gradients(operator, precondition, residual, steps):  # type: ignore[no-untyped-def]
    """Preconditioned conjugate gradients from zero (Hestenes & Stiefel 1952)."""
    solution = torch.zeros_like(residual)
    preconditioned = precondition(residual)
    direction = preconditioned
    inner = (residual * preconditioned).sum((-2, -1), keepdim=True)
    floor = inner * 1e-20
    for _ in range(steps):
        applied = operator(direction)
        curvature = (direction * applied).sum((-2, -1), keepdim=True)
        if not bool((curvature > 0).all()) or not bool((inner > floor).all()):
            break
        step = inner / curvature
        solution = solution + step * direction
        residual = residual - step * applied
        preconditioned = precondition(residual)
        following = (residual * preconditioned).sum((-2, -1), keepdim=True)
        direction = preconditioned + (following / inner) * direction
        inner = following
    return solution


def fit_output(problem: Problem, rank: int) -> Fit:
    """Fit the ``output`` scheme in closed form: PCA of ``G^½ C G^½``.

    The weighted error on the rows seen is the tail of the spectrum; the plain mean squared error
    is ``Σ_{i>r} λ_i |G^-½ u_i|² / c_out``.
    """
    geometry = problem.geometry
    if rank >= geometry.full_rank:
        return _exact(problem, "output", (rank,))
    root, inverse = problem.roots
    spectrum = problem.spectrum
    basis = spectrum.eigenvectors[:, :, :rank]
    first = basis.mT @ root @ problem.matrix
    up = inverse @ basis
    weights = stage_weights(geometry, "output", *_balance(first, up.unsqueeze(-1)))
    tail = spectrum.eigenvalues[:, rank:]
    spread = ((inverse @ spectrum.eigenvectors[:, :, rank:]) ** 2).sum(1)
    mse = float((tail * spread).sum()) / geometry.out_channels
    projection = up @ basis.mT @ root
    return Fit("output", (rank,), weights, float(tail.sum()), mse, up @ first, projection)


def fit(problem: Problem, scheme: str, ranks: Ranks, iterations: int = 12) -> Fit:
    """Fit one scheme at given ranks (per group, clipped to full).

    Args:
        problem: The layer in its data's metric.
        scheme: A name of `compress.linalg.schemes.SCHEME_NAMES`.
        ranks: One rank, or ``(r1, r2)`` for ``two_sided``.
        iterations: Rounds of alternating least squares at most; 0 for the start alone.

    Returns:
        The factors, balanced, with the exact errors of this fit.
    """
    limits = full_ranks(problem.geometry, scheme)
    ranks = tuple(min(r, limit) for r, limit in zip(ranks, limits, strict=True))
    if scheme == "output":
        return fit_output(problem, ranks[0])
    if ranks == limits:
        return _exact(problem, scheme, ranks)
    split = problem.split(scheme)
    second = ranks[1] if scheme == "two_sided" else None
    runs = [Alternation(split, start, second) for start in _starts(problem, split, ranks[0])]
    best = min(runs, key=lambda run: run.error())
    if ranks[0] < limits[0]:
        best.run(iterations)
    return _finish(problem, scheme, ranks, best)


def refine(problem: Problem, warm: Fit, iterations: int) -> Fit:
    """Alternate further from given factors, under another target or metric.

    With ``iterations`` 0 only the last factor (for ``two_sided``: the last two) is solved.
    """
    scheme, ranks = warm.scheme, warm.ranks
    if scheme == "output" or ranks == full_ranks(problem.geometry, scheme):
        return fit(problem, scheme, ranks)
    split = problem.split(scheme)
    run = Alternation(split, warm.weights[0].flatten(2).to(split.dtype), _second(warm))
    run.run(iterations)
    return _finish(problem, scheme, ranks, run)


def _second(warm: Fit) -> int | None:
    return warm.ranks[1] if warm.scheme == "two_sided" else None


def _starts(problem: Problem, split: Split, rank: int) -> list[Tensor]:
    """First factors to begin from: the whitened SVD and, for pointwise ones, input PCA."""
    starts = [split.start[:, :rank]]
    if split.outer > 1 and split.inner == problem.geometry.in_channels // problem.geometry.groups:
        components = eigenbasis(split.inner_covariance).eigenvectors[:, :, :rank].mT
        starts.append(components.to(split.dtype))
    return starts


def _exact(problem: Problem, scheme: str, ranks: Ranks) -> Fit:
    """Factor a weight without any loss at full rank, by identities alone."""
    geometry, weight = problem.geometry, problem.weight
    ordered = split_weight(weight, geometry, scheme)
    groups, out, outer, inner = ordered.shape
    eye: dict[str, object] = {"dtype": torch.float64, "device": weight.device}
    up = None
    if inner <= out * outer:
        first = torch.eye(inner, **eye).expand(groups, -1, -1)  # type: ignore[call-overload]
        last = ordered.transpose(2, 3)
    else:
        first = ordered.reshape(groups, out * outer, inner)
        selector = torch.eye(out * outer, **eye)  # type: ignore[call-overload]
        last = selector.reshape(out, outer, out * outer).transpose(1, 2).expand(groups, -1, -1, -1)
    if scheme == "two_sided":
        rank = first.shape[1]
        if out <= rank * outer:
            up = torch.eye(out, **eye).expand(groups, -1, -1)  # type: ignore[call-overload]
        else:
            up = last.reshape(groups, out, rank * outer)
            core = torch.eye(rank * outer, **eye)  # type: ignore[call-overload]
            last = core.reshape(-1, rank, outer).expand(groups, -1, -1, -1)
    weights = stage_weights(geometry, scheme, first, last, up)
    contiguous = tuple(w.contiguous() for w in weights)
    identity = torch.eye(out, **eye).expand(groups, -1, -1)  # type: ignore[call-overload]
    return Fit(scheme, ranks, contiguous, 0.0, 0.0, problem.matrix, identity)


def _finish(problem: Problem, scheme: str, ranks: Ranks, run: Alternation) -> Fit:
    first, last, up = run.first.double(), run.last.double(), None
    if scheme == "two_sided":
        if run.core is None or run.up is None:
            raise ValueError("a two_sided fit without its second rank")
        last, up = _balance_pair(run.core.double(), run.up.double())
        first, last = _balance(first, last)
    else:
        first, last = _balance(first, last)
    weights = stage_weights(problem.geometry, scheme, first, last, up)
    matrix = chain_matrix(problem.geometry, scheme, weights)
    loss, mse = problem.errors(matrix)
    return Fit(scheme, ranks, weights, loss, mse, matrix)


def chain_matrix(geometry: Geometry, scheme: str, weights: tuple[Tensor, ...]) -> Tensor:
    """``Ŵ [groups, out, d]`` of a chain's stage weights."""
    first = weights[0].flatten(2)
    last = weights[1].flatten(3)
    if scheme == "two_sided":
        last = torch.einsum("gpc,gcro->gpro", weights[2].flatten(2), last)
    full = combine_factors(first, last)  # [g, out, outer, inner]
    groups, out = full.shape[:2]
    k_h, k_w = geometry.kernel_size
    if scheme == "output":
        return full.flatten(2)
    if scheme == "spatial":
        return full.reshape(groups, out, k_w, -1, k_h).permute(0, 1, 3, 4, 2).flatten(2)
    return full.reshape(groups, out, k_h, k_w, -1).permute(0, 1, 4, 2, 3).flatten(2)


def _balance(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Give both factors of every component equal norms; components of norm zero are skipped.

    Unbalanced factors make any later gradient step diverge.
    """
    a = first.norm(dim=2)
    b = last.flatten(3).norm(dim=3).norm(dim=1)
    live = (a > 0) & (b > 0)
    scale = torch.where(live, (b / a.clamp_min(1e-300)).sqrt(), torch.ones_like(a))
    return first * scale.unsqueeze(2), last / scale[:, None, :, None]


def _balance_pair(core: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Balance the second bond of ``two_sided``: core ``[g, r2, r1, o]``, up ``[g, out, r2]``."""
    flat, last = _balance(core.flatten(2), up.unsqueeze(-1))
    return flat.reshape(core.shape), last.squeeze(-1)


def rank_grid(limit: int, points: int) -> list[int]:
    """Ranks from 1 to ``limit``, all of them where few, else about ``points`` of them.

    Half the grid is spaced evenly and half in proportion, since small ranks differ most.
    """
    if limit <= points:
        return list(range(1, limit + 1))
    half = points // 2
    even = {max(1, round(limit * i / half)) for i in range(1, half + 1)}
    proportional = {max(1, round(limit ** (i / (points - half - 1)))) for i in range(points - half)}
    return sorted(even | proportional)


def grid_losses(
    problem: Problem, scheme: str, ranks: list[int], iterations: int = 0
) -> dict[Ranks, float]:
    """Predicted loss of a scheme over a grid of ranks, never rising with the rank.

    ``output`` gives every rank of the grid from one spectrum; the others solve the last factor at
    each rank of the whitened SVD start (with ``iterations`` rounds of alternation). For
    ``two_sided`` the grid is of first ranks, and each gives all second ranks of a grid.
    """
    if scheme == "output":
        tail = problem.spectrum.tail()
        return {(r,): float(tail[r]) for r in ranks}
    split = problem.split(scheme)
    losses: dict[Ranks, float] = {}
    rows = split.start
    limit = full_ranks(problem.geometry, scheme)
    for rank in ranks:
        run = Alternation(split, rows[:, :rank])
        run.run(iterations, steps=3)
        base = max(run.error(), 0.0)
        if scheme != "two_sided":
            losses[(rank,)] = base
            continue
        tail = _last_tail(run)
        for second in rank_grid(min(limit[1], tail.shape[0] - 1), 24):
            losses[(rank, second)] = base + float(tail[second])
    return losses


def _last_tail(run: Alternation) -> Tensor:
    """Loss added by cutting the last factor to each rank ``[out + 1]``."""
    s = run.split
    groups, rank, inner = run.first.shape
    flat = combine_factors(run.first, run.last).flatten(2)
    root = s.problem.roots[0].to(s.dtype)
    target = root @ flat
    gram = (target @ s.cov_flat) @ target.mT
    return eigenbasis(gram.double()).tail()
