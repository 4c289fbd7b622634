"""Pictures that are like the given ones, for a network that would learn few of them by heart.

The original says what is right for whatever picture it is shown, so that pictures may be mirrored,
shifted, and have pieces of others pasted in (CutMix: Yun et al., 2019, there with mixed labels).
Whether that suits the data is not decided here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NONE, MIRRORED, SHIFTED, MOVED, PASTED = "none", "mirrored", "shifted", "moved", "pasted"
# Pictures are shifted by up to this share of a side.
FARTHEST = 1 / 8
# A piece that is pasted in has these shares of a side, at least and at most.
PIECE = 1 / 8, 3 / 4
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
        kind: ``"none"``; ``"mirrored"``: half of them, left to right; ``"shifted"``: all, by up to
            an eighth of a side, with what lies at the border reflected; ``"moved"``: both;
            ``"pasted"``: moved, and every other one with a rectangle of the next one in its place.
        seed: Decides all of it.
    """
    if kind == NONE:
        return inputs
    generator = torch.Generator().manual_seed(seed)
    if kind != SHIFTED:
        inputs = _mirrored(inputs, generator)
    if kind != MIRRORED:
        inputs = _shifted(inputs, generator)
    return _pasted(inputs, generator) if kind == PASTED else inputs


def _mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    down, right = int(height * FARTHEST), int(width * FARTHEST)
    padded = F.pad(images, (right, right, down, down), mode="reflect")
    tops = torch.randint(0, 2 * down + 1, (count,), generator=generator)
    lefts = torch.randint(0, 2 * right + 1, (count,), generator=generator)
    cut = [
        padded[i, :, top : top + height, left : left + width]
        for i, (top, left) in enumerate(zip(tops.tolist(), lefts.tolist(), strict=True))
    ]
    return torch.stack(cut)


def _pasted(images: Tensor, generator: torch.Generator) -> Tensor:
    sides = images.shape[2:]
    for index in range(0, len(images) - 1, 2):
        places = []
        for side in sides:
            least, most = (max(1, int(side * share)) for share in PIECE)
            length = int(torch.randint(least, most + 1, (), generator=generator))
            start = int(torch.randint(0, side - length + 1, (), generator=generator))
            places.append(slice(start, start + length))
        images[index, :, places[0], places[1]] = images[index + 1, :, places[0], places[1]]
    return images
