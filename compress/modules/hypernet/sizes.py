"""Sizes and shapes as callers give them: integers of any library, and nothing else."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def size(what: str, value: Any, least: int = 1) -> int:
    """Return a size as an ``int``.

    Args:
        what: What errors call it.
        value: A Python or NumPy integer, or anything else with ``__index__``.
        least: The smallest size allowed.

    Raises:
        TypeError: A boolean, a float, or anything else that is not an integer.
        ValueError: A size below ``least``.
    """
    kind = type(value).__name__
    # A boolean counts as an integer in Python, but as a size it is a misplaced flag.
    if kind in ("bool", "bool_") or (isinstance(value, Tensor) and value.dtype == torch.bool):
        raise TypeError(f"{what} must be an integer, not the boolean {value!r}.")
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{what} must be an integer, not the {kind} {value!r}.") from error
    if number < least:
        raise ValueError(f"{what} is {number}; it must be at least {least}.")
    return number


def shape(what: str, value: Any) -> tuple[int, ...]:
    """Return a shape as a tuple of ``int``; sides may be zero.

    Raises:
        TypeError: No sequence, or a side that is not an integer.
        ValueError: A negative side.
    """
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{what} must be a tuple of integers, not the {type(value).__name__} "
                        f"{value!r}.")  # fmt: skip
    return tuple(size(f"{what}[{index}]", side, least=0) for index, side in enumerate(value))
