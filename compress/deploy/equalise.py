"""Chains of layers whose values in between suit eight bits: not so small beside the largest."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from compress.layers.registry import registered_kind
from compress.running.forward import evaluation_mode, forward_hooks, run_model
from compress.running.modules import replace_module

# A channel that is smaller than the largest by more is left smaller, not blown up.
_LEAST = 1e-4
# How far channels are brought to the same range: 0 leaves them, 1 makes all alike.
_EXPONENTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
# Steps that values are counted in: of activations from 0, and of weights on either side of it.
_ACTIVATION_STEPS, _WEIGHT_STEPS = 255, 64


def equalised(model: nn.Module, chains: Iterable[str], batches: Sequence[Any]) -> nn.Module:
    """Return a copy of a network in which the channels inside chains reach more equally far.

    Between two layers of a chain there is no activation, so that a channel may be multiplied by
    any number where it comes out of the first and divided by it where it goes into the second.
    The channels of a low-rank factor are of very different sizes, and steps of the largest are
    coarse for the small ones; but the more these are blown up, the smaller are their weights in
    the second layer beside the others of the same row, whose steps they share. Of powers of the
    ranges' ratios the one is taken with the least error of both kinds, see `_rounding`. Compare
    cross-layer equalisation (Nagel et al., arXiv 1906.04721), which balances ranges of weights.

    Args:
        model: The network.
        chains: The names of its chains, ``nn.Sequential`` of layers without anything in between.
        batches: Inputs, on which the channels are measured.
    """
    new = copy.deepcopy(model)
    parts = {name: list(new.get_submodule(name).children()) for name in chains}
    inside = [part for chain in parts.values() for part in chain[:-1]]
    seen = _channels(new, inside, batches)
    for name, chain in parts.items():
        scales = [_scale(seen[part], after) for part, after in pairwise(chain)]
        for index, part in enumerate(chain):
            out = scales[index] if index < len(scales) else None
            into = scales[index - 1] if index else None
            replace_module(new, f"{name}.{index}" if name else str(index), _scaled(part, out, into))
    return new


@dataclass
class _Channels:
    """Of each channel of a layer's output: how far it reaches, and its mean square."""

    largest: Tensor
    squares: Tensor


def _channels(
    model: nn.Module, layers: Iterable[nn.Module], batches: Sequence[Any]
) -> dict[nn.Module, _Channels]:
    found: dict[nn.Module, _Channels] = {}

    def see(layer: nn.Module, _: Any, output: Tensor) -> None:
        rows = registered_kind(layer).images(output.detach()).movedim(1, 0).flatten(1)
        largest, squares = rows.abs().amax(1), rows.square().mean(1)
        if layer in found:
            known = found[layer]
            largest, squares = torch.maximum(known.largest, largest), known.squares + squares
        found[layer] = _Channels(largest, squares)

    with torch.no_grad(), evaluation_mode(model), forward_hooks(dict.fromkeys(layers, see)):
        for inputs in batches:
            run_model(model, inputs)
    for channels in found.values():
        channels.squares /= len(batches)
    return found


def _scale(channels: _Channels, after: nn.Module) -> Tensor:
    """What each channel is multiplied by before the layer that reads them."""
    largest = channels.largest.max()
    if not largest > 0:
        return torch.ones_like(channels.largest)
    relative = channels.largest / largest
    full = torch.where(relative > 0, 1 / relative.clamp_min(_LEAST), 1.0)
    return min(
        (full**exponent for exponent in _EXPONENTS), key=lambda s: _rounding(channels, after, s)
    )


def _rounding(channels: _Channels, after: nn.Module, scale: Tensor) -> float:
    """The summed squared error of a layer's outputs by rounding its inputs and its weights.

    Rounding to steps of a size has an error of a twelfth of its square, left out here. Inputs share
    one step, the weights of an output channel another.
    """
    kind = registered_kind(after)
    groups = kind.geometry(after).groups
    weight = kind.weight(after).detach().flatten(3)  # [groups, out, in, taps]
    scales = scale.reshape(groups, 1, -1, 1)
    weight = weight / scales
    inputs = (channels.squares * scale.square()).reshape(groups, 1, -1, 1)
    of_inputs = ((channels.largest * scale).max() / _ACTIVATION_STEPS).square()
    of_weights = (weight.abs().amax((2, 3), keepdim=True) / _WEIGHT_STEPS).square()
    return float(
        (of_inputs * weight.square()).sum() + (of_weights * inputs).sum() * weight.shape[3]
    )


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
