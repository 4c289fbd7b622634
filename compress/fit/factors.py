"""The factors of a replaced layer, and judging what a refit made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from compress.linalg.fit import Fit
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
