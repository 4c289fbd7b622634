"""Fitting one layer anew to rows of what it is given and of what it should give.

Where the rows come from is the business of the walks: along the graph (`compress.fit.in_order`), or
by watching the layers of both networks (`compress.fit.by_module`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from compress.fit.factors import LEAST_GAIN, Factors, whole
from compress.fit.frequencies import Frequencies, lowest_of_rows
from compress.layers import registered_kind
from compress.linalg.fit import Covariances, Problem, refine, takes_no_rounds
from compress.linalg.geometry import Geometry, output_rows, patch_rows
from compress.linalg.moments import Moments
from compress.linalg.problem import roots_of, solve_psd
from compress.linalg.schemes import too_long
from compress.linalg.spectrum import regularise
from compress.network.sites import LayerSite
from compress.plan import NARROW

# Ridge strengths tried, in units of the mean eigenvalue of the patches' covariance.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# Rows that a layer is fitted to, over all batches.
ROWS = 1 << 16
# The work of a fit grows with the square of a patch's length for every row, and with its cube for
# every ridge. Beyond this length there are as many rows as cost no more than `ROWS` of it, though
# at least so many per number of a patch; every second ridge is tried, in float32, of which the
# weakest ridge is ten times the rounding.
LONG_PATCH = 1200
ROWS_PER_NUMBER = 8
# Moments of longer patches with their targets take more than a gigabyte, twice, and a fit to them
# several times that.
MOST_TOGETHER = 3 << 12
# Numbers of patches that are unfolded for their lowest frequencies: images beyond these, but at
# least so many, are only looked at by position.
LOWEST_NUMBERS = 1 << 28
LEAST_IMAGES = 64
# Errors of long patches below this share of what there is to explain are taken in float64.
EXACT_BELOW = 1e-3
# Those unfolded at a time.
_CHUNK = 1 << 24


def most_rows(geometry: Geometry) -> int:
    """How many rows a layer is fitted to, over all batches."""
    length = geometry.in_features
    if length <= LONG_PATCH:
        return ROWS
    return min(ROWS, max(ROWS_PER_NUMBER * length, ROWS * LONG_PATCH**2 // length**2))


def too_large(geometry: Geometry) -> bool:
    """Whether a layer's own refit would take minutes or gigabytes; the joint one moves it too."""
    together = geometry.in_features + geometry.out_features
    return too_long(geometry) is not None or together > MOST_TOGETHER


def ridges(geometry: Geometry) -> tuple[float, ...]:
    """The strengths that are tried for a layer."""
    return RIDGES if geometry.in_features <= LONG_PATCH else RIDGES[::2]


@dataclass(frozen=True)
class Refit:
    """What became of one layer: held-out weighted error per row, before and after."""

    before: float
    after: float


class Regression:
    """Moments of rows ``[patch, target]`` of one layer.

    Args:
        site: The layer.
        device: Where they are kept.
        frequencies: What errors cost by how smoothly they vary; without them all alike.
    """

    def __init__(
        self, site: LayerSite, device: torch.device, frequencies: Frequencies | None = None
    ) -> None:
        g = site.geometry
        self.d = g.in_features
        self.frequencies = frequencies
        self.moments, self.constant, self.waves = (
            Moments(g.groups, g.in_features + g.out_features, device) for _ in range(3)
        )

    def add(self, patches: Tensor, targets: Tensor) -> None:
        """Add ``[groups, rows, in_features]`` and ``[groups, rows, out_features]``."""
        self.moments.update(torch.cat([patches, targets], dim=2))

    def add_lowest(self, patches: Tensor, targets: Tensor) -> None:
        """Add the lowest frequencies of whole images, ``[groups, images, lowest, features]``."""
        assert self.frequencies is not None
        rows = torch.cat([patches, targets], dim=3)
        self.constant.update(rows[:, :, 0])
        scale = self.frequencies.excess[1:].sqrt().to(rows)
        self.waves.update((rows[:, :, 1:] * scale.unsqueeze(1)).flatten(1, 2))

    @cached_property
    def covariance(self) -> Tensor:
        """Of whole rows, at the scale of one position, once all are added."""
        found = self.frequencies
        covariance = self.moments.taken_covariance()
        if found is None or not self.constant.count:
            return covariance
        # Cosines but the constant one have no mean that a bias could take.
        covariance *= found.rest
        share = 1 / found.positions
        covariance.add_(self.waves.second_moment, alpha=(len(found.excess) - 1) * share)
        lowest = self.constant.taken_covariance()
        return covariance.add_(lowest, alpha=float(found.excess[0]) * share)

    @cached_property
    def mean(self) -> Tensor:
        """Of whole rows."""
        found = self.frequencies
        if found is None or not self.constant.count:
            return self.moments.mean
        return self.constant.mean / math.sqrt(found.positions)

    @cached_property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariances of patches, of targets with patches, of targets, once all rows are added."""
        covariance, d = self.covariance, self.d
        return covariance[:, :d, :d], covariance[:, d:, :d], covariance[:, d:, d:]

    def error(self, weighting: Tensor, matrix: Tensor, bias: Tensor) -> float:
        """``E[(t - Ŵx - b)ᵀ G (t - Ŵx - b)]`` with bias ``[groups, out]``."""
        xx, _, tt = self.parts
        if self.d > LONG_PATCH:
            moved = (matrix.float() @ xx.float()).double()
            rough = self._error(weighting, matrix, bias, moved)
            # A small difference of large numbers needs them exact.
            if rough > EXACT_BELOW * float((weighting * tt).sum()):
                return rough
        return self._error(weighting, matrix, bias, matrix @ xx)

    def _error(self, weighting: Tensor, matrix: Tensor, bias: Tensor, moved: Tensor) -> float:
        """As `error`, with ``Ŵ E[xxᵀ]``."""
        _, tx, tt = self.parts
        gram = tt - matrix @ tx.mT - tx @ matrix.mT + moved @ matrix.mT
        rest = self.bias(matrix) - bias
        if self.frequencies is not None and self.constant.count:
            rest = rest * math.sqrt(self.frequencies.rest + float(self.frequencies.excess[0]))
        gram = gram + rest.unsqueeze(2) * rest.unsqueeze(1)
        # Where nothing is missed, rounding may leave less than that.
        return max(float((weighting * gram).sum()), 0.0)

    def bias(self, matrix: Tensor) -> Tensor:
        """The bias that makes the mean exact, ``[groups, out]``."""
        mean = self.mean
        return mean[:, self.d :] - (matrix @ mean[:, : self.d].unsqueeze(2)).squeeze(2)


@dataclass(frozen=True)
class Rows:
    """What a layer sees on the images to fit on, and on those that decide."""

    train: Regression
    held_out: Regression

    @classmethod
    def of(
        cls, site: LayerSite, device: torch.device, frequencies: Frequencies | None = None
    ) -> Rows:
        """No rows yet; arguments as `Regression`."""
        return cls(*(Regression(site, device, frequencies) for _ in range(2)))

    def add(self, patches: Tensor, targets: Tensor, *, held_out: bool) -> None:
        """Add ``[groups, rows, in_features]`` and ``[groups, rows, out_features]``."""
        (self.held_out if held_out else self.train).add(patches, targets)

    def add_images(self, given: Tensor, target: Tensor, site: LayerSite, *, held_out: bool) -> None:
        """Add the lowest frequencies of whole images ``[images, channels, *size]``."""
        into = self.held_out if held_out else self.train
        size = tuple(target.shape[2:])
        if into.frequencies is None or size != into.frequencies.size:
            return
        geometry = site.geometry
        length = geometry.groups * (geometry.in_features + geometry.out_features)
        numbers = math.prod(size) * length
        if into.constant.count >= max(LOWEST_NUMBERS // numbers, LEAST_IMAGES):
            return
        step = max(_CHUNK // numbers, 1)
        for start in range(0, len(target), step):
            part = slice(start, start + step)
            rows = patch_rows(given[part], geometry), output_rows(target[part], geometry)
            into.add_lowest(*(lowest_of_rows(r, size) for r in rows))


@dataclass(frozen=True)
class Sampling:
    """Which output positions of a batch are looked at: the same in every walk.

    Attributes:
        batches: How many batches there are, those that decide included.
        seed: Of the draw.
        device: Where the positions are used.
    """

    batches: int
    seed: int
    device: torch.device

    def positions(self, batch: int, shape: torch.Size, most: int) -> Tensor | None:
        """Positions ``[images, samples]``, one in each equal stretch; None for all of them.

        Args:
            batch: The batch's number, which the draw depends on.
            shape: Of the layer's output, ``[images, channels, ...]``.
            most: How many rows are wanted, over all batches.
        """
        images, places = shape[0], math.prod(shape[2:])
        wanted = max(1, most // (self.batches * images))
        if places <= wanted:
            return None
        generator = torch.Generator().manual_seed(self.seed + batch)
        jitter = torch.rand(images, wanted, generator=generator)
        stretch = places / wanted
        places_taken = ((torch.arange(wanted) + jitter) * stretch).long().clamp_(max=places - 1)
        return places_taken.to(self.device)


@dataclass(frozen=True)
class Layer:
    """One replaced layer with the factors that it has before the refit."""

    site: LayerSite
    module: nn.Module
    old: Factors

    def solve(self, rows: Rows, iterations: int) -> tuple[Factors, Refit]:
        """Fit the layer anew; the old factors stay unless the held-out error falls.

        The ridge pulls towards the original weight, not towards zero, and its strength is chosen on
        the held-out rows with only the last factor; then all factors are refitted at that strength.
        """
        old = self.old
        groups, out = self.site.geometry.groups, self.site.geometry.out_features
        bias = old.bias.double().view(groups, out)
        before = rows.held_out.error(old.weighting, old.fit.matrix, bias)
        best, least = old, before * (1 - LEAST_GAIN)
        attempt = self._attempts(rows)
        trials = {ridge: attempt(ridge, 0) for ridge in ridges(self.site.geometry)}
        ridge = min(trials, key=lambda r: trials[r][0])
        scheme = old.fit.scheme
        narrow = scheme == NARROW
        alternates = iterations and not narrow and not takes_no_rounds(self.site.geometry, scheme)
        for error, found in (
            trials[ridge],
            attempt(ridge, iterations) if alternates else trials[ridge],
        ):
            if error < least:
                best, least = found, error
        return best, Refit(before, before if best is old else least)

    def _attempts(self, rows: Rows) -> Callable[[float, int], tuple[float, Factors]]:
        """Return what fits the layer at a ridge's strength, with rounds of alternation."""
        old, weight = self.old, registered_kind(self.module).weight(self.module)
        shape, weight = weight.shape, weight.double().flatten(2)
        xx, tx, _ = rows.train.parts
        scale = xx.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(1e-300)
        missing = tx - weight @ xx
        roots = roots_of(regularise(old.weighting))
        long = self.site.geometry.in_features > LONG_PATCH
        dtype = torch.float32 if long else torch.float64

        def attempt(ridge: float, rounds: int) -> tuple[float, Factors]:
            padded = xx.clone()
            padded.diagonal(dim1=-2, dim2=-1).add_(ridge * scale)
            wanted = weight + solve_psd(padded.to(dtype), missing.to(dtype)).double()
            if old.fit.scheme == NARROW:
                found = whole(wanted.reshape(shape))
            else:
                problem = Problem(
                    self.site.geometry, wanted.reshape(shape), Covariances(None, padded),
                    old.weighting, roots,
                )  # fmt: skip
                found = refine(problem, old.fit, rounds)
            bias = rows.train.bias(found.matrix)
            error = rows.held_out.error(old.weighting, found.matrix, bias)
            return error, Factors(found, bias.flatten(), old.weighting)

        return attempt
