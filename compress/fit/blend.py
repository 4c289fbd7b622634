"""Inputs that the joint refit learns from: in part those of the original network.

The images that are fitted to have had errors taken out of them by every step before, while those of
other images stay larger and are different ones: what learns from nothing but the former learns them
by heart. So half of the numbers of an input, drawn at random in each step, are the original
network's, and only the others have the compressed network's errors (randomly dropped quantisation:
Wei et al., "QDrop", 2022). What decides sees compressed inputs only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def can_be_blended(given: Any, original: Any) -> bool:
    """Whether two inputs are real numbers of one shape."""
    tensors = isinstance(given, Tensor) and isinstance(original, Tensor)
    return tensors and given.is_floating_point() and given.shape == original.shape


def blended(given: Tensor, original: Tensor, generator: torch.Generator) -> Tensor:
    """Return an input with half of its numbers as the original network has them.

    Args:
        given: What the compressed network feeds, ``[images, ...]``.
        original: The same in the original network.
        generator: Draws which, on the CPU: the same however images are batched.
    """
    return torch.where(_drawn(given, generator), original, given)


def _drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    """A random bit for every number of ``[images, ...]``, laid out in memory as these."""
    images, numbers = len(like), like[:1].numel()
    size = images, -(-numbers // 8)
    drawn = torch.randint(256, size, dtype=torch.uint8, generator=generator).to(like.device)
    bits = torch.stack([drawn & (1 << bit) for bit in range(8)], 2).flatten(1)[:, :numbers]
    return torch.empty_like(like, dtype=torch.bool).copy_(bits.view(like.shape))
