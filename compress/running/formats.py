"""Which memory formats a network's forward takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compress.errors import ModelError
from compress.running.forward import evaluation_mode, run_model, same_outputs
from compress.running.memory_format import MEMORY_FORMATS, in_memory_format
from compress.running.structure import main_tensor, placed, tensors


def formats_of(model: nn.Module, example: Any) -> tuple[str, ...]:
    """Return ``"contiguous"``, and ``"channels_last"`` unless a ``view`` or the like is in the way.

    Args:
        model: The network.
        example: The inputs of one image, on its device.

    Raises:
        ModelError: The forward fails as it is.
    """
    return tuple(name for name in MEMORY_FORMATS if _runs_in(model, example, name))


def _runs_in(model: nn.Module, example: Any, memory_format: str) -> bool:
    """Whether a model computes the same in a memory format."""
    if memory_format == "contiguous":
        return True
    if all(tensor.dim() != 4 for tensor in tensors(example).values()):
        return False
    with torch.no_grad(), evaluation_mode(model):
        expected, device = run_model(model, example), main_tensor(example).device
        with in_memory_format(model, memory_format):
            try:
                found = run_model(model, placed(example, device, memory_format))
            except ModelError:
                return False
    return same_outputs(expected, found)
