"""Recurrent layers: counted and named, and kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.running.forward import ForwardHook, evaluation_mode, forward_hooks, run_model
from compress.running.modules import module_names

_TYPES = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class RecurrentLayer:
    """An LSTM, a GRU or the like, or one of their cells.

    Attributes:
        name: Its first qualified name; ``aliases`` are all of them.
        kind: Name of its type.
        shape: Inputs and hidden units, such as ``"512→256"``.
        calls: How often it runs in one forward pass.
        macs: Multiply-accumulates per image, over all calls.
        params: Parameters, biases included.
        reason: Why it is kept.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    shape: str
    calls: int
    macs: int
    params: int
    reason: str


def recurrent_layers(
    model: nn.Module, example: Any, macs: Mapping[str, int]
) -> tuple[RecurrentLayer, ...]:
    """Find every recurrent layer, in the order of the model's tree.

    Args:
        model: The network; left as it was.
        example: One input with the batch axis.
        macs: What each module computes itself, by qualified name.
    """
    names = module_names(model)
    found: list[nn.Module] = [module for module in names if isinstance(module, _TYPES)]
    if not found:
        return ()
    calls = dict.fromkeys(found, 0)

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        del inputs, output
        calls[module] += 1

    hooks: dict[nn.Module, ForwardHook] = dict.fromkeys(found, count)
    with torch.no_grad(), evaluation_mode(model), forward_hooks(hooks):
        run_model(model, example)
    return tuple(_described(m, names[m], calls[m], macs) for m in found)


def _described(
    module: nn.Module, names: tuple[str, ...], calls: int, macs: Mapping[str, int]
) -> RecurrentLayer:
    kind = type(module).__name__
    article = "an" if kind.startswith(("LSTM", "RNN")) else "a"
    return RecurrentLayer(
        name=names[0],
        aliases=names,
        kind=kind,
        shape=f"{module.input_size}→{module.hidden_size}",
        calls=calls,
        macs=sum(macs.get(name, 0) for name in names),
        params=sum(p.numel() for p in module.parameters()),
        reason=f"weights of {article} {kind}: it computes all of its steps itself, so that no "
        "chain of layers can stand for them",
    )
