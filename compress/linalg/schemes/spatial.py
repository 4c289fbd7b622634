"""The ``spatial`` scheme: k x 1 to r channels, then 1 x k (Jaderberg et al. 2014).

In three dimensions the first layer acts along the depth, and the second on height and width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.linalg.schemes.record import CHANNEL, FIRST, REST, Scheme

if TYPE_CHECKING:
    from compress.linalg.geometry import Geometry


def _unsuited(geometry: Geometry) -> str | None:
    first, *rest = geometry.kernel_size
    if first == 1 or math.prod(rest) == 1:
        return "its kernel has one row or one column, so that nothing is separable"
    return None


SPATIAL = Scheme(
    name="spatial",
    summary="k x 1 to r channels, then 1 x k",
    inner=(CHANNEL, FIRST),
    outer=(REST,),
    cored=False,
    unsuited=_unsuited,
)
