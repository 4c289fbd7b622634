"""The ``output`` scheme: k x k to r channels, then 1 x 1 (Zhang et al. 2015, section 3.1)."""

from __future__ import annotations

from compress.linalg.schemes.record import CHANNEL, FIRST, REST, Scheme

OUTPUT = Scheme(
    name="output",
    summary="k x k to r channels, then 1 x 1",
    inner=(CHANNEL, FIRST, REST),
    outer=(),
    cored=False,
    unsuited=lambda _: None,
)
