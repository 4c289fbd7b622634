"""Mixed precision: forwards computed in bfloat16 where that is fast and does little harm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.running.structure import mapped

Forward = Callable[[nn.Module, Any], Any]


def computes_in_bfloat16(device: torch.device | str) -> bool:
    """Whether a device has instructions of its own for numbers of type bfloat16."""
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Older versions of torch do not say what a processor can do.
    if kind != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))


def in_mixed_precision(forward: Forward, device: torch.device | str) -> Forward:
    """Return a forward that computes in bfloat16 what torch takes for safe in it.

    Weights stay in single precision, which their gradients come in too, and so does what the
    network returns. Unlike half precision, bfloat16 has the range of single precision, so that no
    loss has to be scaled (Micikevicius et al., "Mixed precision training", 2018; Kalamkar et al.,
    "A study of BFLOAT16 for deep learning training", 2019).

    Args:
        forward: Takes a network and its inputs, as `compress.running.forward.run_model`.
        device: Where they are.
    """
    kind = torch.device(device).type

    def mixed(model: nn.Module, inputs: Any) -> Any:
        with torch.autocast(kind, dtype=torch.bfloat16):
            result = forward(model, inputs)
        return mapped(result, _single)

    return mixed


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
