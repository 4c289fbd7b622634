"""Whether a refit made the whole network better, not only each of its parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from compress.running.forward import evaluation_mode, run_model
from compress.running.memory_format import in_memory_format
from compress.running.outputs import Reading
from compress.running.structure import count


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
