"""Pictures that are like the given ones, for a network that would learn few of them by heart.

The original says what is right for whatever picture it is shown, so that pictures may be mirrored,
shifted freely. Whether that suits the data is decided by held-out images.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NONE, MOVED = "none", "moved"
# Pictures are shifted by up to this share of a side.
FARTHEST = 1 / 8
# Smaller ones are no pictures.
SMALLEST_SIDE = 8


def are_pictures(inputs: Any) -> bool:
    """Whether the inputs of a batch are pictures, ``[images, 1 to 4 channels, height, width]``."""
    return (
        isinstance(inputs, Tensor)
        and inputs.is_floating_point()
        and inputs.dim() == 4
        and inputs.shape[1] <= 4
        and min(inputs.shape[2:]) >= SMALLEST_SIDE
    )


def augmented(inputs: Any, kind: str, seed: int) -> Any:
    """Return a batch of pictures, changed; the same for the same seed.

    Args:
        inputs: ``[images, channels, height, width]`` on the CPU; anything for `NONE`.
        kind: ``"none"``; ``"moved"``: half of them mirrored, and all shifted by up to an eighth of
            a side, with what lies at the border reflected.
        seed: Decides all of it.
    """
    if kind == NONE:
        return inputs
    return _moved(inputs, torch.Generator().manual_seed(seed))


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    down, right = int(height * FARTHEST), int(width * FARTHEST)
    padded = F.pad(images, (right, right, down, down), mode="reflect")
    tops = torch.randint(0, 2 * down + 1, (count,), generator=generator)
    lefts = torch.randint(0, 2 * right + 1, (count,), generator=generator)
    cut = [
        padded[i, :, top : top + height, left : left + width]
        for i, (top, left) in enumerate(zip(tops.tolist(), lefts.tolist(), strict=True))
    ]
    return torch.stack(cut)
