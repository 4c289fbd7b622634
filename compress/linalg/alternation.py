"""Alternating least squares for two factors in the data's metric.

Minimises ``tr(G (W - Ŵ) C (W - Ŵ)ᵀ)`` over ``Ŵ[c, o, i] = Σ_r B[c, r, o] A[r, i]`` (the Tucker-2
form ``B = up · core`` for ``two_sided``). The last factor's step is closed-form: regression, of
reduced rank where there are two (Izenman 1975). The first factor's is a few conjugate gradient
steps on the operator, whose normal matrix is never formed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compress.linalg.problem import Split, combine_factors, orthogonal_rows, solve_psd
from compress.linalg.spectrum import eigenbasis

_TINY = 1e-30


class Alternation:
    """Alternating least squares for one split at one rank.

    Each step can only lower the error: the last factor is solved exactly (as a correction to
    itself, so that a singular system does no harm), the first by conjugate gradients from where
    it stands, preconditioned by the Kronecker product of the two factors' own Gram matrices.

    Args:
        split: The problem.
        first: Where to begin, ``A [groups, r, inner]``.
        second_rank: For ``two_sided``, the rank of the last factor.

    Attributes:
        first: ``A [groups, r, inner]``, its rows orthonormal.
        last: ``B [groups, out, r, outer]``.
        up: For ``two_sided``, ``[groups, out, r2]``.
        core: For ``two_sided``, ``[groups, r2, r, outer]``.
    """

    def __init__(self, split: Split, first: Tensor, second_rank: int | None = None) -> None:
        self.split = split
        self.second_rank = second_rank
        self.up: Tensor | None = None
        self.core: Tensor | None = None
        groups, rank, _ = first.shape
        self.last = first.new_zeros(groups, split.out, rank, split.outer)
        self.first = first
        self.solve_last()

    def solve_last(self) -> None:
        """Solve the last factor for the first."""
        s = self.split
        self.first, triangle = orthogonal_rows(self.first)
        last = torch.einsum("gcro,grk->gcok", self.last, triangle)  # [g, out, outer, r]
        shape = last.shape
        projected, gram = s.project(self.first)
        target = (s.pulled_weight @ self.first.unsqueeze(1).mT).flatten(2)
        last = last.flatten(2)
        last = last + solve_psd(gram, target - last @ gram)
        if self.second_rank is not None:
            root, inverse = (m.to(s.dtype) for m in s.problem.roots)
            weighted = root @ last
            basis = eigenbasis(weighted @ gram @ weighted.mT).eigenvectors
            basis = basis[:, :, : self.second_rank]
            core = basis.mT @ weighted
            self.up = inverse @ basis
            self.core = core.reshape(shape[0], -1, *shape[2:]).transpose(2, 3)
            last = self.up @ core
        self.last = last.reshape(shape).transpose(2, 3)
        # (W - Ŵ) C, which is both the gradient and the error's other half.
        self._pulled = s.pulled_weight - (last @ projected.mT).reshape(s.weight.shape)

    def solve_first(self, steps: int) -> None:
        """Improve the first factor by ``steps`` preconditioned conjugate gradient steps."""
        s = self.split
        groups, rank, inner = self.first.shape
        weighted = torch.einsum("gcd,gdro->gcro", s.weighting, self.last)
        taps = torch.einsum("gcro,gcqp->grpoq", self.last, weighted)
        taps = taps.reshape(groups, rank, s.outer * s.outer * rank)
        mean_tap = torch.einsum("gcro,gcqo->grq", self.last, weighted)
        flat = s.covariance.reshape(groups, s.outer, inner, s.outer * inner)

        def operator(a: Tensor) -> Tensor:
            # a C for every pair of taps (p, o), then K over (p, o, rank): [g, r, inner]
            moved = (a.unsqueeze(1) @ flat).reshape(groups, s.outer, rank, s.outer, inner)
            moved = moved.transpose(2, 3).reshape(groups, s.outer * s.outer * rank, inner)
            return taps @ moved

        def precondition(a: Tensor) -> Tensor:
            return solve_psd(mean_tap, a.mT).mT @ s.inner_inverse

        residual = torch.einsum("gcro,gcoi->gri", weighted, self._pulled)
        self.first = self.first + conjugate_gradients(operator, precondition, residual, steps)

    def error(self) -> float:
        """Current ``tr(G Δ C Δᵀ)``."""
        s = self.split
        delta = (s.weight - combine_factors(self.first, self.last)).flatten(2)
        return float((s.weighting * (self._pulled.flatten(2) @ delta.mT)).sum())

    def explained(self) -> Tensor:
        """``R Ŵ C Ŵᵀ Rᵀ [groups, out, out]``, what a lower rank of the last factor cuts."""
        s = self.split
        root = s.problem.roots[0].to(s.dtype)
        full = combine_factors(self.first, self.last)
        pulled = (s.pulled_weight - self._pulled).flatten(2)
        return root @ pulled @ full.flatten(2).mT @ root.mT

    def run(self, iterations: int, steps: int = 3, tolerance: float = 2e-3) -> None:
        """Alternate until the error falls by less than ``tolerance`` of itself."""
        error = self.error() if iterations else 0.0
        for _ in range(iterations):
            before = (self.first, self.last, self.up, self.core, self._pulled)
            self.solve_first(steps)
            self.solve_last()
            now = self.error()
            if now > error:  # rounding only, at convergence
                self.first, self.last, self.up, self.core, self._pulled = before
                return
            if now >= error * (1 - tolerance):
                return
            error = now


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    residual: Tensor,
    steps: int,
) -> Tensor:
    """Preconditioned conjugate gradients from zero (Hestenes & Stiefel 1952), group by group.

    Args:
        operator: Linear, positive semi-definite on each group's ``[m, n]``.
        precondition: Its approximate inverse.
        residual: Right-hand side ``[groups, m, n]``.
        steps: Steps at most; a group that has converged stands still.

    Returns:
        The solution ``[groups, m, n]``.
    """
    solution = torch.zeros_like(residual)
    direction = preconditioned = precondition(residual)
    inner = (residual * preconditioned).sum((-2, -1), keepdim=True)
    floor = inner * 1e-20 + _TINY
    for _ in range(steps):
        applied = operator(direction)
        curvature = (direction * applied).sum((-2, -1), keepdim=True)
        live = (curvature > 0) & (inner > floor)
        if not bool(live.any()):
            break
        step = torch.where(live, inner / curvature, torch.zeros_like(inner))
        solution = solution + step * direction
        residual = residual - step * applied
        preconditioned = precondition(residual)
        following = (residual * preconditioned).sum((-2, -1), keepdim=True)
        turn = torch.where(live, following / inner, torch.zeros_like(inner))
        direction = preconditioned + turn * direction
        inner = following
    return solution
