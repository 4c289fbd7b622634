"""How much of a refit makes the whole network better, not only each of its parts.

A refit fits many weights to few images, one part of the network after the other, and what each part
gains on images that it was not fitted to is small beside what all of them learn by heart. Half of
the way is then often better than all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from compress.running.forward import evaluation_mode, run_model
from compress.running.memory_format import in_memory_format
from compress.running.outputs import Reading
from compress.running.structure import count

# Parts of the changes that are tried, all of them first.
SHARES = (1.0, 0.75, 0.5, 0.25)
# All is kept unless outputs are so much farther from the original's than with less: few images
# decide.
CLEARLY_WORSE = 0.02
# A network that is sure of everything comes this near, which is rounding.
ROUNDING = 1e-12


def divergences(
    networks: Sequence[nn.Module],
    batches: Iterable[Any],
    reading: Reading,
    memory_format: str,
) -> list[float]:
    """How far each network's outputs are from those of the first, the mean over images.

    Args:
        networks: The original, and others of the same inputs and outputs.
        batches: Inputs, placed.
        reading: What the outputs stand for.
        memory_format: What all run in.
    """
    totals, images = [0.0] * len(networks), 0
    for inputs in batches:
        reference = None
        images += count(inputs)
        for index, network in enumerate(networks):
            with (
                torch.inference_mode(),
                evaluation_mode(network),
                in_memory_format(network, memory_format),
            ):
                result = run_model(network, inputs)
                reference = result if reference is None else reference
                totals[index] += float(reading.divergence(reference, result).sum())
    return [total / max(images, 1) for total in totals]


def best_share(apart: Sequence[float]) -> tuple[float, str]:
    """How much of a refit to keep; all of it unless that is clearly worse than less.

    Args:
        apart: How far the network before the refit is, and then those with the first of `SHARES`
            of the changes; not a number where outputs are not finite.

    Returns:
        The share, and why it is not all; empty where it is.
    """
    shares = (0.0, *SHARES)
    finite = [distance for distance in apart if distance < math.inf]
    least, whole = min(finite, default=math.nan), apart[1]
    if whole <= least * (1 + CLEARLY_WORSE) + ROUNDING:
        return 1.0, ""
    best = max((i for i, distance in enumerate(apart) if distance == least), default=0)
    if not whole < math.inf:
        left = "all of it left outputs on validation images that are not finite"
    else:
        times = whole / max(least, ROUNDING)
        left = (
            "all of it left the outputs on validation images "
            f"{times:.3g} times as far from the original's"
        )
    return shares[best], left
