"""Balanced factors: equal norms on both sides of every bond.

Unbalanced factors make any later gradient step diverge and overflow half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 100
_CLOSE = 1e-9


def balance(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Give both factors of every component equal norms; components with a zero are skipped.

    Args:
        first: ``A [groups, r, inner]``.
        last: ``B [groups, out, r, outer]``.
    """
    scale = _scale(first.norm(dim=2), last.norm(dim=(1, 3)))
    return first * scale.unsqueeze(2), last / scale[:, None, :, None]


def balance_three(first: Tensor, core: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Balance both bonds of ``two_sided``.

    Each bond's scaling moves the norms at the other one, so they take turns: alternating
    minimisation of the sum of squares, which is convex in the logarithms of the scales.

    Args:
        first: ``[groups, r1, inner]``.
        core: ``[groups, r2, r1, outer]``.
        up: ``[groups, out, r2]``.
    """
    squares = core.square().sum(3)  # [g, r2, r1]
    outer_left, outer_right = first.norm(dim=2), up.norm(dim=1)
    left, right = torch.ones_like(outer_left), torch.ones_like(outer_right)
    for _ in range(_ROUNDS):
        before = left
        inner = torch.einsum("gsr,gs->gr", squares, right.square()).sqrt()
        left = _scale(outer_left, inner)
        inner = torch.einsum("gsr,gr->gs", squares, left.square().reciprocal()).sqrt()
        right = _scale(inner, outer_right)
        if bool(((left / before - 1).abs() < _CLOSE).all()):
            break
    core = core / left[:, None, :, None] * right[:, :, None, None]
    return first * left.unsqueeze(2), core, up / right.unsqueeze(1)


def _scale(left: Tensor, right: Tensor) -> Tensor:
    """What to multiply the left side by; 1 where a side is zero."""
    live = (left > 0) & (right > 0)
    ratio = torch.where(live, right, torch.ones_like(right)) / torch.where(
        live, left, torch.ones_like(left)
    )
    return ratio.sqrt()
