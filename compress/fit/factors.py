"""The factors of a replaced layer, and judging what a refit made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.linalg.fit import Fit, with_weights
from compress.linalg.geometry import Geometry
from compress.network.chains import Chain
from compress.plan import NARROW

# A refit is kept where it lowers the held-out error by this much at least.
LEAST_GAIN = 1e-3


def whole(weight: Tensor) -> Fit:
    """A layer that is not factored, only narrower, as a fit; its errors are not known.

    Args:
        weight: ``[groups, out, in, *kernel]``.
    """
    return Fit(NARROW, (), (weight,), math.nan, math.nan, weight.flatten(2))


@dataclass(frozen=True)
class Factors:
    """One replaced layer as it stands.

    Attributes:
        fit: Its factors.
        bias: ``[c_out]``.
        weighting: ``G [groups, out, out]``, regularised.
    """

    fit: Fit
    bias: Tensor
    weighting: Tensor

    @property
    def chain(self) -> Chain:
        """What to build."""
        return Chain(self.fit.scheme, self.fit.ranks, self.fit.weights, self.bias)


def partly(old: Factors, new: Factors, share: float, geometry: Geometry) -> Factors:
    """Factors on the way from old ones to new ones of the same ranks.

    What lies between two factors can be rotated without a change of their product; so the new ones
    are first turned to the old ones, as near as that comes (orthogonal Procrustes problem:
    Schönemann, 1966).

    Args:
        old: Those at a share of nothing.
        new: Those at a share of one.
        share: How far to go.
        geometry: The layer that they replace.
    """
    if share == 1 or new is old:
        return new
    turned = list(new.fit.weights)
    for i in range(len(turned) - 1):
        turn = _turn(old.fit.weights[i : i + 2], turned[i : i + 2])
        turned[i] = torch.einsum("gab,gb...->ga...", turn, turned[i])
        turned[i + 1] = torch.einsum("gob...,gab->goa...", turned[i + 1], turn)
    weights = tuple(torch.lerp(a, b, share) for a, b in zip(old.fit.weights, turned, strict=True))
    one = len(weights) == 1
    fit = whole(weights[0]) if one else with_weights(geometry, old.fit, weights)
    return replace(old, fit=fit, bias=torch.lerp(old.bias, new.bias.to(old.bias), share))


def _turn(old: Sequence[Tensor], new: Sequence[Tensor]) -> Tensor:
    """Orthogonal ``[groups, r, r]`` that turns what lies between two factors to other ones."""
    before, after = (
        (weights[0].flatten(2), weights[1].transpose(1, 2).flatten(2)) for weights in (old, new)
    )
    crossed = before[0] @ after[0].mT + before[1] @ after[1].mT
    left, _, right = torch.linalg.svd(crossed)
    turn: Tensor = left @ right
    return turn
