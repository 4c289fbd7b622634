"""Rows pooled over an image's positions by the gradient of its loss.

Changing a layer's weight by ``Δ`` changes an image's loss by ``Σ_p g_pᵀ Δ x_p`` to first order,
summed over output positions ``p``, and the mean square of that over images, with the gradients of
`compress.calibrate.fisher`, is the second-order increase. Weighting each position's error by
``G = E[g gᵀ]`` and adding up neglects what positions have in common: on ResNet-20 the increase
comes out two to four times too small, differently for each layer. The sum over positions is
``⟨D, Δ⟩`` with ``D = Σ_p g_p x_pᵀ``, the gradient of the weight, so that a metric ``G ⊗ C`` with
``C ∝ E[Dᵀ D]`` accounts for it: the rows of ``D``, one per output channel, take the place of the
patches (Shampoo's statistic: Gupta, Koren & Singer 2018; ``G ⊗ C`` fitted to whole gradients:
Koroko et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.linalg.geometry import Geometry, output_rows, patch_rows
from compress.linalg.moments import Moments
from compress.linalg.spectrum import shrink

# Rows of a layer at most, over all images: wider layers pool random combinations of channels.
POOLED_ROWS = 1 << 16
# The part of the plain covariance in the mixture, for directions that few gradients reached.
PLAIN_SHARE = 0.3
# Patch elements unfolded at a time.
_CHUNK = 1 << 24
# What rounding may take from an eigenvalue, in parts of the trace: rows are multiplied in float32.
_ROUNDING = 2.0**-22


def channel_sketch(geometry: Geometry, images: int, seed: int) -> Tensor:
    """Combinations of output channels whose gradients are pooled, ``[out, k]``.

    The identity where that many rows are affordable, else random signs, ``E[S Sᵀ] = I``.
    """
    out = geometry.out_features
    wanted = max(POOLED_ROWS // max(images * geometry.groups, 1), 1)
    if wanted >= out:
        return torch.eye(out)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (out, wanted), generator=generator) * 2 - 1
    # Rows are averaged, so that k rows stand for out of them.
    scaled: Tensor = signs / out**0.5
    return scaled


@dataclass
class Pool:
    """How a layer's rows are pooled.

    Rows are taken from ``x - reference`` with a reference near the mean, and moved to the mean
    itself in the end: taking the mean's part off a sum of raw rows would leave rounding larger
    than the smallest eigenvalues, and an indefinite covariance, in whose metric a fit runs away.

    Attributes:
        geometry: The layer.
        sketch: See `channel_sketch`.
        patches: Whether rows are patches or outputs.
        reference: Near the rows' mean, ``[groups, features]``.
    """

    geometry: Geometry
    sketch: Tensor
    patches: bool
    reference: Tensor | None = None

    def rows(self, activation: Tensor, gradient: Tensor, images: int) -> Iterator[Tensor]:
        """Rows ``Σ_p g_p [x_p - reference, 1]`` of each image and channel.

        Args:
            activation: The layer's input where ``patches``, else its output; ``[batch, ...]``.
            gradient: At the layer's output ``[batch, out_channels, *size]``.
            images: How many images the batch holds; what else its axis counts is pooled.

        Yields:
            ``[groups, images * k, features + 1]`` of some images at a time.
        """
        geometry = self.geometry
        each = gradient.shape[0] // images
        length = geometry.in_features if self.patches else geometry.out_features
        size = each * math.prod(gradient.shape[2:]) * geometry.groups * length
        step = max(_CHUNK // max(size, 1), 1)
        places = each * math.prod(gradient.shape[2:])
        # Of an image that is too large even alone, so many positions at a time.
        block = places if size <= _CHUNK else max(places * _CHUNK // size, 1)
        for start in range(0, images, step):
            part = slice(start * each, (start + step) * each)
            count = min(step, images - start)
            pooled = sum(
                self._summed(activation[part], gradient[part], count, taken)
                for taken in _blocks(places, block, count, gradient.device)
            )
            assert isinstance(pooled, Tensor)
            yield pooled.flatten(1, 2)

    def _summed(
        self, inputs: Tensor, gradient: Tensor, images: int, taken: Tensor | None
    ) -> Tensor:
        """The sums over some positions, ``[groups, images, k, features + 1]``."""
        of_inputs = patch_rows if self.patches else output_rows
        x = of_inputs(inputs, self.geometry, taken)
        if self.reference is not None:
            x = x - self.reference.to(x).unsqueeze(1)
        g = output_rows(gradient, self.geometry, taken) @ self.sketch.to(gradient)
        x, g = (rows.reshape(len(rows), images, -1, rows.shape[2]) for rows in (x.to(g), g))
        return torch.cat([g.mT @ x, g.sum(2).unsqueeze(-1)], dim=3)


def _blocks(places: int, block: int, images: int, device: torch.device) -> Iterator[Tensor | None]:
    """Positions ``[images, block]``, a block at a time; None where all fit into one."""
    if block >= places:
        yield None
        return
    for start in range(0, places, block):
        one = torch.arange(start, min(start + block, places), device=device)
        yield one.expand(images, -1)


def recentre(pooled: Moments, shift: Tensor) -> None:
    """Take ``shift [groups, features]`` more off the rows that were pooled, in place."""
    mean, scatter = pooled.mean.clone(), pooled.scatter.clone()
    mean[:, :-1] -= shift * mean[:, -1:]
    scatter[:, :-1] -= shift.unsqueeze(2) * scatter[:, -1:]
    scatter[:, :, :-1] -= scatter[:, :, -1:] * shift.unsqueeze(1)
    pooled.mean, pooled.scatter = mean, scatter


def pooled_covariance(pooled: Moments, plain: Tensor) -> tuple[Tensor, Tensor]:
    """Return the covariance that stands for pooled rows, at the plain one's scale.

    Args:
        pooled: Moments of rows ``Σ_p g_p [x_p - m, 1]`` with the mean ``m``, which the bias
            absorbs.
        plain: The covariance of the plain rows ``[groups, features, features]``.

    Returns:
        The mixture with the plain covariance, of the plain one's trace, and what pooled rows have
        in units of it, ``[groups, 1, 1]``.
    """
    centred = pooled.second_moment[:, :-1, :-1]
    centred = shrink(centred, min(_ROUNDING * centred.shape[-1], 1.0))
    share = _trace(centred) / _trace(plain).clamp_min(1e-300)
    live = (share > 0) & (_trace(plain) > 0)
    part = (1 - PLAIN_SHARE) / torch.where(live, share, torch.ones_like(share))
    # Where nothing was pooled the plain covariance stands alone.
    mixed = torch.addcmul(plain * torch.where(live, PLAIN_SHARE, 1.0), centred, part * live)
    return mixed, torch.where(live, share, torch.zeros_like(share))


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
