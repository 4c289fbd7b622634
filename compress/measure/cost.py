"""What a model costs: MACs, parameters, bytes."""

from __future__ import annotations

from typing import Any

from torch import nn

from compress.network.counting import count_macs
from compress.result import Cost


def model_cost(model: nn.Module, example: Any, element_size: int | None = None) -> Cost:
    """Count a model's cost for one image.

    MACs are those of everything that runs (`compress.network.counting`); parameters and the bytes
    of parameters and buffers count shared tensors once.

    Args:
        model: The network.
        example: One input with the batch axis, ``[1, ...]``.
        element_size: Bytes a floating-point number takes where the model will be saved in another
            dtype than its own.
    """
    macs = count_macs(model, example)
    params = sum(p.numel() for p in model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(
        t.numel() * (element_size if element_size and t.is_floating_point() else t.element_size())
        for t in tensors
    )
    return Cost(macs, params, size)
