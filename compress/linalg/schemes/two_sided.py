"""The ``two_sided`` scheme: 1 x 1, k x k, 1 x 1, which is Tucker-2 (Kim et al. 2016)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.linalg.schemes.record import CHANNEL, FIRST, REST, Scheme

if TYPE_CHECKING:
    from compress.linalg.geometry import Geometry


def _unsuited(geometry: Geometry) -> str | None:
    if math.prod(geometry.kernel_size) == 1:
        return "its kernel is 1x1, where it is the output scheme with a wasted stage"
    return None


TWO_SIDED = Scheme(
    name="two_sided",
    summary="1 x 1 to r1 channels, k x k to r2, then 1 x 1",
    inner=(CHANNEL,),
    outer=(FIRST, REST),
    cored=True,
    unsuited=_unsuited,
)
