"""The ``spatial`` scheme: k x 1 to r channels, then 1 x k (Jaderberg et al. 2014)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.linalg.schemes.record import CHANNEL, COLUMN, ROW, Scheme

if TYPE_CHECKING:
    from compress.linalg.geometry import Geometry


def _unsuited(geometry: Geometry) -> str | None:
    if min(geometry.kernel_size) == 1:
        return "its kernel has one row or one column, so that nothing is separable"
    return None


SPATIAL = Scheme(
    name="spatial",
    summary="k x 1 to r channels, then 1 x k",
    inner=(CHANNEL, ROW),
    outer=(COLUMN,),
    cored=False,
    unsuited=_unsuited,
)
