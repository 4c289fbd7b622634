"""Whether a refit made the whole network better, not only each of its parts."""

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

# A refit is taken back where outputs came this much farther from the original's: few images decide.
CLEARLY_WORSE = 0.02


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


def nearest(apart: Sequence[float]) -> tuple[int, str]:
    """The stage whose network is nearest to the original; the last unless it is clearly worse.

    Args:
        apart: Of each stage, the first as fitted, how far it is; not a number where its outputs
            are not finite.

    Returns:
        Its index, and why it is not the last; empty where it is.
    """
    finite = [distance for distance in apart if distance < math.inf]
    least, last = min(finite, default=math.nan), apart[-1]
    if last <= least * (1 + CLEARLY_WORSE):
        return len(apart) - 1, ""
    best = max((i for i, distance in enumerate(apart) if distance == least), default=0)
    if not last < math.inf:
        return best, "it left outputs on validation images that are not finite"
    times = last / max(least, 1e-30)
    return (
        best,
        f"it left the outputs on validation images {times:.3g} times as far from the original's",
    )
