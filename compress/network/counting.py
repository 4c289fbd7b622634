"""Multiply-accumulates of a whole network, counted by what runs.

The counter is torch's own (`torch.utils.flop_counter`), which sees every operation: layers that are
kept, convolutions called as functions, recurrent layers, attention.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compress.running.forward import evaluation_mode, run_model

_WHOLE = "Global"


def count_macs(model: nn.Module, example: Any) -> int:
    """Count a network's multiply-accumulates for one image.

    Args:
        model: The network.
        example: One input with the batch axis, ``[1, ...]``.

    Raises:
        ModelError: The forward fails.
    """
    return _counted(model, example).get(_WHOLE, 0)


def macs_by_module(model: nn.Module, example: Any) -> dict[str, int]:
    """Return what each module computes itself, without its children, by qualified name.

    Only modules that compute anything are named; the model itself has the empty name.

    Raises:
        ModelError: The forward fails.
    """
    root = type(model).__name__
    found = {
        name.removeprefix(root).removeprefix("."): macs
        for name, macs in _counted(model, example).items()
        if name == root or name.startswith(f"{root}.")
    }
    own = dict(found)
    for name, macs in found.items():
        parent = name
        while parent:  # the nearest module above that was counted has this one's share too
            parent = parent.rpartition(".")[0]
            if parent in own:
                own[parent] -= macs
                break
    return {name: macs for name, macs in own.items() if macs > 0}


def _counted(model: nn.Module, example: Any) -> Mapping[str, int]:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), evaluation_mode(model), _countable(model), counter:
        run_model(model, example)
    return {str(n): sum(ops.values()) // 2 for n, ops in counter.get_flop_counts().items()}


@contextmanager
def _countable(model: nn.Module) -> Iterator[None]:
    """Keep away the fused kernels that the counter knows nothing of; they compute the same."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of settings of devices that are not there
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
