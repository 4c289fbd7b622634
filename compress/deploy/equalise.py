"""Chains of layers whose values in between are equally large, for runtimes that count in steps."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.layers.registry import registered_kind
from compress.running.forward import evaluation_mode, forward_hooks, run_model
from compress.running.modules import replace_module

# A channel that is smaller than the largest by more is left smaller, not blown up.
_LEAST = 1e-4


def equalised(model: nn.Module, chains: Iterable[str], batches: Sequence[Any]) -> nn.Module:
    """Return a copy of a network in which the channels inside chains reach equally far.

    Between two layers of a chain there is no activation, so that a channel may be multiplied by
    any number where it comes out of the first and divided by it where it goes into the second.
    The channels of a low-rank factor are of very different sizes, and eight bits for all of them
    together would leave the small ones few steps. The rounding error of a channel i with range a_i
    that reaches the output through a column of norm w_i is proportional to max(a) w_i; with ranges
    made equal it is proportional to a_i w_i, which is the least that any scaling gives. Compare
    cross-layer equalisation (Nagel et al., arXiv 1906.04721).

    Args:
        model: The network.
        chains: The names of its chains, ``nn.Sequential`` of layers without anything in between.
        batches: Inputs, on which the ranges are measured.
    """
    new = copy.deepcopy(model)
    parts = {name: list(new.get_submodule(name).children()) for name in chains}
    ranges = _ranges(new, [part for chain in parts.values() for part in chain[:-1]], batches)
    for name, chain in parts.items():
        scales = [_scale(ranges[part]) for part in chain[:-1]]
        for index, part in enumerate(chain):
            out = scales[index] if index < len(scales) else None
            into = scales[index - 1] if index else None
            replace_module(new, f"{name}.{index}" if name else str(index), _scaled(part, out, into))
    return new


def _ranges(
    model: nn.Module, layers: Iterable[nn.Module], batches: Sequence[Any]
) -> dict[nn.Module, Tensor]:
    """The largest absolute value of each channel of some layers."""
    found: dict[nn.Module, Tensor] = {}

    def see(layer: nn.Module, _: Any, output: Tensor) -> None:
        channels_first = registered_kind(layer).images(output.detach()).movedim(1, 0)
        largest = channels_first.abs().flatten(1).amax(1)
        found[layer] = torch.maximum(found[layer], largest) if layer in found else largest

    with torch.no_grad(), evaluation_mode(model), forward_hooks(dict.fromkeys(layers, see)):
        for inputs in batches:
            run_model(model, inputs)
    return found


def _scale(ranges: Tensor) -> Tensor:
    """What each channel is multiplied by, so that all reach as far as the largest."""
    largest = ranges.max()
    if not largest > 0:
        return torch.ones_like(ranges)
    relative = ranges / largest
    return torch.where(relative > 0, 1 / relative.clamp_min(_LEAST), 1.0)


def _scaled(layer: nn.Module, out: Tensor | None, into: Tensor | None) -> nn.Module:
    """A layer whose outputs are multiplied, and whose inputs came multiplied."""
    kind = registered_kind(layer)
    geometry = kind.geometry(layer)
    weight, bias = kind.weight(layer), layer.bias
    assert bias is None or isinstance(bias, Tensor)
    tail = (1,) * len(geometry.kernel_size)
    if out is not None:
        weight = weight * out.reshape(geometry.groups, -1, 1, *tail)
        bias = None if bias is None else bias * out
    if into is not None:
        weight = weight / into.reshape(geometry.groups, 1, -1, *tail)
    built: nn.Module = kind.build(geometry, weight, bias)
    return built.eval()
