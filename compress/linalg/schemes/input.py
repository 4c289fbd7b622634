"""The ``input`` scheme: 1 x 1 to r channels, then k x k."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.linalg.schemes.record import CHANNEL, FIRST, REST, Scheme

if TYPE_CHECKING:
    from compress.linalg.geometry import Geometry


def _unsuited(geometry: Geometry) -> str | None:
    if math.prod(geometry.kernel_size) == 1:
        return "its kernel is 1x1, where the output scheme fits no worse at no more cost"
    return None


INPUT = Scheme(
    name="input",
    summary="1 x 1 to r channels, then k x k",
    inner=(CHANNEL,),
    outer=(FIRST, REST),
    cored=False,
    unsuited=_unsuited,
)
