"""Multiply-accumulates of a whole network, counted by what runs.

The counter is torch's own (`torch.utils.flop_counter`), which sees every operation: layers that are
kept, convolutions called as functions, recurrent layers, attention.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.flop_counter import FlopCounterMode

from compress.running.forward import evaluation_mode, frozen, run_model
from compress.running.modules import module_names


def count_macs(model: nn.Module, example: Any) -> int:
    """Count a network's multiply-accumulates for one image.

    Args:
        model: The network.
        example: One input with the batch axis, ``[1, ...]``.

    Raises:
        ModelError: The forward fails.
    """
    counter = FlopCounterMode(display=False)
    with _countable(model), counter:
        run_model(model, example)
    return counter.get_total_flops() // 2


def macs_by_module(model: nn.Module, example: Any) -> dict[str, int]:
    """Return what each module computes itself, without its children, by qualified name.

    Only modules that compute anything are named; the model itself has the empty name.

    Raises:
        ModelError: The forward fails.
    """
    counter = FlopCounterMode(display=False)
    names = {module: all_names[0] for module, all_names in module_names(model).items()}
    shares = _Shares(counter, names)
    with _countable(model), counter, shares.watched():
        run_model(model, example)
    return {name: flops // 2 for name, flops in shares.flops.items() if flops > 1}


@dataclass
class _Shares:
    """Gives what is counted to the module that is running.

    The counter's own names of modules do not serve: it gives what a shared module computes to each
    module that calls it, wherever the names of the two stand.

    Attributes:
        counter: What counts.
        names: Of the network's modules. The calls of any other belong to their caller.
        flops: Of each module without what it calls, by name.
    """

    counter: FlopCounterMode
    names: Mapping[nn.Module, str]
    flops: dict[str, int] = field(default_factory=dict)
    running: list[str] = field(default_factory=lambda: [""])
    given: int = 0

    def enter(self, module: nn.Module, _: Any) -> None:
        """Begin with a module."""
        self._give()
        self.running.append(self.names.get(module, self.running[-1]))

    def leave(self, *_: Any) -> None:
        """End with the module that was begun with last."""
        self._give()
        self.running.pop()

    def _give(self) -> None:
        total, name = self.counter.get_total_flops(), self.running[-1]
        self.flops[name] = self.flops.get(name, 0) + total - self.given
        self.given = total

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch all modules, compiled ones too, which take no hooks of their own."""
        handles = (
            register_module_forward_pre_hook(self.enter),
            register_module_forward_hook(self.leave, always_call=True),
        )
        try:
            yield
            self._give()
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _countable(model: nn.Module) -> Iterator[None]:
    """Keep away the fused kernels that the counter knows nothing of; they compute the same.

    Parameters are frozen, too: the counter follows gradients, and fails at views of parameters that
    a forward takes while there are none.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        for context in (torch.no_grad(), evaluation_mode(model), frozen(model)):
            stack.enter_context(context)
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
