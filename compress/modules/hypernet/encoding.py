"""Encodings of a hypernetwork's inputs."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

Encoding = Literal["cos|sin", "z|1-z"] | None
ENCODINGS = (None, "cos|sin", "z|1-z")


def encode(z: Tensor, encoding: Encoding) -> Tensor:
    """Encode inputs in [0, 1] such that their size does not scale the output.

    Args:
        z: ``[*, n]``.
        encoding: ``"cos|sin"`` gives ``[cos(πz/2), sin(πz/2)]``, whose norm is constant;
            ``"z|1-z"`` gives ``[z, 1 - z]``; None gives ``z``.

    Returns:
        ``[*, 2 n]``, or ``[*, n]`` without an encoding. A warning is given for values outside
        [0, 1], where values can be read (not under `torch.func.vmap` or a compiler).

    Raises:
        ValueError: An unknown encoding.

    References:
        arXiv 2304.07645, section 4.1.
    """
    check_encoding(encoding)
    if encoding is None:
        return z
    if _is_outside(z):
        warnings.warn(
            f"The encoding {encoding!r} takes inputs in [0, 1]; some are outside.",
            UserWarning,
            stacklevel=2,
        )
    if encoding == "cos|sin":
        angle = z * (math.pi / 2)
        return torch.cat([angle.cos(), angle.sin()], dim=-1)
    return torch.cat([z, 1 - z], dim=-1)


def check_encoding(encoding: object) -> None:
    """Raise ValueError for an unknown encoding."""
    if encoding not in ENCODINGS:
        raise ValueError(
            f"encoding={encoding!r} is unknown; the encodings are "
            f"{', '.join(repr(e) for e in ENCODINGS)}."
        )


def _is_outside(z: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    try:
        return not bool(((z >= 0) & (z <= 1)).all())
    except RuntimeError:  # values that cannot be read: under vmap, or on the meta device
        return False
