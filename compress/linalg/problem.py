"""One layer's weight in the metric of its data, and the same reordered for a scheme."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compress.linalg.geometry import Geometry
from compress.linalg.schemes import scheme_named
from compress.linalg.schemes.record import Scheme
from compress.linalg.spectrum import Spectrum, eigenbasis, regularise

# Beyond this patch length the alternating fits run in float32: half the memory and time.
FLOAT32_BEYOND = 1200


@dataclass(frozen=True)
class Covariances:
    """What is known of a layer's rows: the covariance of its outputs, its patches or both.

    Attributes:
        outputs: Covariance of its outputs ``[groups, out, out]``; None where it follows from that
            of the patches.
        inputs: Covariance of its patches ``[groups, d, d]``; None where only ``output`` is wanted.
        input_mean: Mean patch ``[groups, d]``; None where it is not known.
    """

    outputs: Tensor | None = None
    inputs: Tensor | None = None
    input_mean: Tensor | None = None


class Problem:
    """One layer's weight with the metric of its data.

    Args:
        geometry: The layer's geometry.
        weight: ``[groups, out, in, *kernel]``.
        covariances: Of the layer's rows.
        weighting: ``G [groups, out, out]``; None for the plain mean squared error.
        roots: `roots` of another problem with the same weighting, to compute them once.
    """

    def __init__(
        self,
        geometry: Geometry,
        weight: Tensor,
        covariances: Covariances,
        weighting: Tensor | None = None,
        roots: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.geometry = geometry
        self.weight = weight.double()
        if covariances.outputs is not None:
            self.__dict__["output_covariance"] = covariances.outputs
        self.input_covariance = covariances.inputs
        self.input_mean = covariances.input_mean
        eye = torch.eye(geometry.out_features, dtype=torch.float64, device=weight.device)
        self.weighting = (
            eye.expand(geometry.groups, -1, -1) if weighting is None else regularise(weighting)
        )
        self.plain = weighting is None
        if roots is not None:
            self.__dict__["roots"] = roots  # as the cached property would
        self._splits: dict[tuple[tuple[int, ...], ...], Split] = {}

    @cached_property
    def matrix(self) -> Tensor:
        """``W [groups, out, d]``."""
        return self.weight.flatten(2)

    @cached_property
    def output_covariance(self) -> Tensor:
        """``W C Wᵀ [groups, out, out]``."""
        covariance = self.input_covariance
        assert covariance is not None  # one of the two is given
        return self.matrix @ covariance @ self.matrix.mT

    @cached_property
    def roots(self) -> tuple[Tensor, Tensor]:
        """``R`` with ``Rᵀ R = G``, and its inverse; see `roots_of`."""
        if self.plain:
            return self.weighting, self.weighting
        return roots_of(self.weighting)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Eigenbasis of ``R C_y Rᵀ``, at most ``full_rank`` of it."""
        if self._outputs_are_fewer:
            spectrum = eigenbasis(self.rooted(self.rooted(self.output_covariance).mT))
            rank = self.geometry.full_rank
            return Spectrum(spectrum.eigenvalues[:, :rank], spectrum.eigenvectors[:, :, :rank])
        # The smaller side: singular vectors of R W C^½.
        left, values, _ = torch.linalg.svd(
            self.rooted(self.matrix @ self._input_half), full_matrices=False
        )
        return Spectrum(values**2 * self._live, left)

    @property
    def eigenvalues(self) -> Tensor:
        """Those of the spectrum, ``[groups, full_rank]``, in a fraction of its time."""
        if "spectrum" in self.__dict__:
            return self.spectrum.eigenvalues
        if self._outputs_are_fewer:
            return self._descending(self.rooted(self.rooted(self.output_covariance).mT))
        through = self.rooted(self.matrix @ self._input_half)
        return self._descending(through.mT @ through) * self._live

    @property
    def _outputs_are_fewer(self) -> bool:
        return (
            self.input_covariance is None or self.geometry.in_features >= self.geometry.out_features
        )

    @property
    def _live(self) -> Tensor:
        """Of each group whether its patches vary at all, ``[groups, 1]``."""
        assert self.input_covariance is not None
        return self.input_covariance.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) > 0

    def _descending(self, matrix: Tensor) -> Tensor:
        values: Tensor = torch.linalg.eigvalsh(matrix)
        return values.flip(-1).clamp_min(0.0)[:, : self.geometry.full_rank]

    def rooted(self, rows: Tensor) -> Tensor:
        """``R rows``; without a product where the metric is plain."""
        return rows if self.plain else self.roots[0] @ rows

    @cached_property
    def _input_half(self) -> Tensor:
        """``L`` with ``L Lᵀ`` the patches' covariance and a whisper of identity.

        The whisper keeps a basis spanning W's whole range where the data do not.
        """
        covariance = self.input_covariance
        assert covariance is not None
        scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
        whisper = torch.where(scale > 0, 1e-12 * scale, torch.ones_like(scale))[:, None, None]
        eye = torch.eye(covariance.shape[-1], dtype=torch.float64, device=covariance.device)
        half: Tensor
        half, failed = torch.linalg.cholesky_ex(covariance + whisper * eye)
        while bool(failed.any()):
            # Rows multiplied in float32 leave a rank-deficient covariance slightly indefinite.
            whisper = whisper * 10
            if not bool((whisper < scale[:, None, None] + 1).all()):
                raise ValueError("a covariance that is not finite cannot be factored")
            half, failed = torch.linalg.cholesky_ex(covariance + whisper * eye)
        return half

    @cached_property
    def plain_spectrum(self) -> Tensor:
        """Eigenvalues ``[groups, full_rank]`` of the outputs' covariance, whatever the metric."""
        if self.plain:
            return self.eigenvalues
        if self._outputs_are_fewer:
            return self._descending(self.output_covariance)
        # The smaller side has the same eigenvalues: those of Lᵀ Wᵀ W L for C = L Lᵀ.
        through = self.matrix @ self._input_half
        return self._descending(through.mT @ through) * self._live

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

    def split(self, name: str) -> Split:
        """Return the problem reordered for a scheme, cached."""
        scheme = scheme_named(name)
        key = (scheme.inner, scheme.outer)  # a core changes nothing about the order
        if key not in self._splits:
            self._splits[key] = Split(self, scheme)
        return self._splits[key]

    def release(self) -> None:
        """Drop the cached reorderings, which are as large as the covariance."""
        self._splits.clear()


class Split:
    """A problem with its patch index split in ``outer`` and ``inner`` (see `schemes`).

    Attributes:
        dtype: float64, or float32 for long patches.
        weight: ``W [groups, out, outer, inner]``.
        covariance: ``C [groups, outer, inner, outer * inner]``.
        weighting: ``G [groups, out, out]``.
    """

    def __init__(self, problem: Problem, scheme: Scheme) -> None:
        if problem.input_covariance is None:
            raise ValueError(f"the {scheme.name} scheme needs the patches' covariance")
        geometry = problem.geometry
        long = geometry.in_features > FLOAT32_BEYOND
        self.dtype = torch.float32 if long else torch.float64
        self.weight = scheme.split_weight(problem.weight).to(self.dtype)
        self.groups, self.out, self.outer, self.inner = self.weight.shape
        ordered = scheme.split_covariance(problem.input_covariance.to(self.dtype), geometry)
        self.covariance = ordered.reshape(self.groups, self.outer, self.inner, -1)
        self.weighting = problem.weighting.to(self.dtype)
        # A strong reference would be a cycle, and covariances would wait for the collector.
        self._problem = weakref.ref(problem)

    @property
    def problem(self) -> Problem:
        """The problem that this is a reordering of."""
        problem = self._problem()
        assert problem is not None  # whoever has the split from a problem holds that too
        return problem

    @cached_property
    def inner_covariance(self) -> Tensor:
        """Mean over the outer taps of the inner part's covariance ``[groups, n, n]``, float64."""
        blocks = self.covariance.reshape(
            self.groups, self.outer, self.inner, self.outer, self.inner
        )
        mean = blocks.diagonal(dim1=1, dim2=3).mean(-1).double()
        scale = mean.diagonal(dim1=-2, dim2=-1).mean(-1)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))[:, None, None]
        eye = torch.eye(self.inner, dtype=torch.float64, device=mean.device)
        # The ridge must outweigh what rounding took from the smallest eigenvalues: rows are
        # multiplied in float32, which shows where one eigenvalue dwarfs all others.
        ridge = 1e-6 if self.dtype == torch.float32 else 1e-8
        while bool(torch.linalg.cholesky_ex(mean + ridge * scale * eye)[1].any()):
            if not ridge < 1:
                raise ValueError("a covariance that is not finite cannot be factored")
            ridge *= 10
        return mean + ridge * scale * eye

    @cached_property
    def inner_half(self) -> Tensor:
        """Cholesky factor ``L`` of `inner_covariance`."""
        factor: Tensor = torch.linalg.cholesky(self.inner_covariance)
        return factor

    @cached_property
    def inner_inverse(self) -> Tensor:
        """Inverse of `inner_covariance`, the first factor's preconditioner."""
        inverse: Tensor = torch.cholesky_inverse(self.inner_half)
        return inverse.to(self.dtype)

    @cached_property
    def start(self) -> Tensor:
        """Rows of the first factor in order of weight ``[groups, inner, inner]``: whitened SVD.

        With ``C̄ = L Lᵀ`` the mean covariance of the inner part, the rows are ``Vᵀ L⁻¹`` with ``V``
        the right singular vectors of ``R W L`` over all outer taps; any root of ``C̄`` gives the
        same subspaces.
        """
        half = self.inner_half
        weighted = torch.einsum(
            "gpc,gcon->gpon", self.problem.roots[0], self.weight.double()
        ).flatten(1, 2)
        tall = weighted @ half
        basis = eigenbasis(tall.mT @ tall).eigenvectors
        rows = torch.linalg.solve_triangular(half, basis.mT, upper=False, left=False)
        return orthogonal_rows(rows)[0].to(self.dtype)

    @cached_property
    def components(self) -> Tensor:
        """Principal components of the inner part in rows ``[groups, inner, inner]``."""
        return eigenbasis(self.inner_covariance).eigenvectors.mT.to(self.dtype)

    def components_and_mean(self, rank: int) -> Tensor | None:
        """Leading components, and of the mean what they lack: ``[groups, rank, inner]``.

        With the mean's direction in the basis what zero padding does to the mean is kept at the
        borders too, where a bias cannot. None where that direction is missing already.
        """
        mean = self.problem.input_mean
        if mean is None or rank < 2 or rank >= self.inner:
            return None
        channels = mean.reshape(self.groups, self.inner, -1).mean(-1).to(self.dtype)
        basis = self.components[:, : rank - 1]
        lacking = channels.unsqueeze(1) - (channels.unsqueeze(1) @ basis.mT) @ basis
        length = lacking.norm(dim=2, keepdim=True)
        if bool((length <= 1e-8 * channels.norm(dim=1)[:, None, None]).any()):
            return None
        return torch.cat([basis, lacking / length], dim=1)

    @cached_property
    def pulled_weight(self) -> Tensor:
        """``W C [groups, out, outer, inner]``."""
        flat = self.covariance.flatten(1, 2)
        return (self.weight.flatten(2) @ flat).reshape(self.weight.shape)

    def loss_of_nothing(self) -> float:
        """``tr(G W C Wᵀ)``, what is lost with no rank at all."""
        gram = self.pulled_weight.flatten(2) @ self.weight.flatten(2).mT
        return float((self.problem.weighting * gram.double()).sum())

    def project(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``C Mᵀ`` and ``M C Mᵀ`` for ``M = A ⊗ I``, the lifting of the first factor.

        Args:
            first: ``A [groups, r, inner]``.

        Returns:
            ``[groups, outer * inner, outer * r]`` and ``[groups, outer * r, outer * r]``.
        """
        groups, rank, inner = first.shape
        wide = self.outer * rank
        stretched = self.covariance.reshape(groups, -1, inner) @ first.mT
        projected = stretched.reshape(groups, self.outer, inner, wide)
        gram = (first.unsqueeze(1) @ projected).reshape(groups, wide, wide)
        return projected.flatten(1, 2), (gram + gram.mT) / 2


def orthogonal_rows(first: Tensor) -> tuple[Tensor, Tensor]:
    """``A = T Q`` with orthonormal rows Q; returns Q and T, so that ``B A = (B T) Q``.

    ``T`` is lower triangular: the leading rows of Q span what the leading rows of A do.
    """
    q, r = torch.linalg.qr(first.mT)
    return q.mT.contiguous(), r.mT


def combine_factors(first: Tensor, last: Tensor) -> Tensor:
    """``Ŵ [groups, out, outer, inner]`` of ``A [groups, r, n]`` and ``B [groups, out, r, o]``."""
    groups, out, rank, outer = last.shape
    flat = last.permute(0, 1, 3, 2).reshape(groups, out * outer, rank) @ first
    return flat.reshape(groups, out, outer, first.shape[-1])


def cholesky_psd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Factor a positive semi-definite matrix with a hint of ridge, in proportion to its diagonal.

    Returns:
        ``s [groups, n, 1]`` and lower triangular ``L [groups, n, n]`` with
        ``matrix + ridge ≈ S⁻¹ L Lᵀ S⁻¹`` for ``S = diag(s)``.

    Raises:
        ValueError: The matrix is not finite.
    """
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    double = matrix.dtype == torch.float64
    floor = diagonal.amax(-1, keepdim=True) * (1e-15 if double else 1e-8)
    # An all-zero matrix (dead inputs) becomes the identity.
    floor = torch.where(floor > 0, floor, torch.ones_like(floor))
    scale = diagonal.clamp_min(floor).rsqrt().unsqueeze(-1)
    scaled = matrix * scale * scale.mT
    ridge = 1e-12 if double else 1e-6
    while True:
        damped = scaled.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(ridge)
        factor, info = torch.linalg.cholesky_ex(damped)
        if not bool(info.any()):
            return scale, factor
        if not ridge < 1e3:
            raise ValueError("a matrix that is not finite cannot be factored")
        ridge *= 100


def roots_of(weighting: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``R [groups, n, n]`` with ``Rᵀ R`` a positive definite matrix, and ``R⁻¹``.

    Any root of a metric gives the same best approximations. This one is upper triangular, which
    takes a twentieth of the time of the symmetric one where n is in the thousands.

    Raises:
        ValueError: The matrix is not finite.
    """
    scale, factor = cholesky_psd(weighting)
    upper = factor.mT
    eye = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    inverse = torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True)
    return upper / scale.mT, inverse * scale


def solve_psd(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve ``X matrix = right`` for a positive semi-definite matrix, ``right [groups, m, n]``."""
    scale, factor = cholesky_psd(matrix)
    return (torch.cholesky_solve(right.mT * scale, factor) * scale).mT
