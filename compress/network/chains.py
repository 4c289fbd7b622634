"""Building a new model in which chosen layers are chains of plain layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.layers.registry import kind_for
from compress.linalg.geometry import Geometry
from compress.linalg.schemes import Ranks, scheme_named
from compress.network.sites import LayerSite
from compress.plan import NARROW
from compress.running.modules import cast, replace_module


@dataclass(frozen=True)
class Chain:
    """What a layer becomes.

    Attributes:
        scheme: The scheme's name.
        ranks: Ranks per group.
        weights: One ``[groups, out, in, *kernel]`` per stage.
        bias: ``[c_out]`` of the last stage, the only one that has a bias.
    """

    scheme: str
    ranks: Ranks
    weights: tuple[Tensor, ...]
    bias: Tensor


def stages(geometry: Geometry, scheme: str, ranks: Ranks) -> tuple[Geometry, ...]:
    """The layers that stand for one: a chain, or the layer by itself where it is only narrow."""
    return (geometry,) if scheme == NARROW else scheme_named(scheme).stages(geometry, ranks)


def build_chain(geometry: Geometry, chain: Chain, like: nn.Module) -> nn.Module:
    """Build the plain layers, in the dtype, on the device and with the flags of ``like``."""
    reference = next(like.parameters())
    layers = []
    parts = stages(geometry, chain.scheme, chain.ranks)
    for index, (stage, weight) in enumerate(zip(parts, chain.weights, strict=True)):
        bias = chain.bias.to(reference, copy=True) if index == len(parts) - 1 else None
        layers.append(kind_for(stage).build(stage, weight.to(reference, copy=True), bias))
    built = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
    built.train(like.training)
    for parameter in built.parameters():
        parameter.requires_grad_(reference.requires_grad)
    old = like._parameters.get("bias")
    if old is not None:
        layers[-1].bias.requires_grad_(old.requires_grad)
    return built


def empty_chain(geometry: Geometry, scheme: str, ranks: Ranks, like: nn.Module) -> nn.Module:
    """Build the layers without values, for a state dict to fill."""
    reference = next(like.parameters())
    weights = tuple(
        torch.empty(g.groups, g.out_features, g.in_channels // g.groups, *g.kernel_size)
        for g in stages(geometry, scheme, ranks)
    )
    bias = torch.empty(geometry.out_channels)
    return build_chain(geometry, Chain(scheme, ranks, weights, bias.to(reference)), like)


def random_chain(geometry: Geometry, scheme: str, ranks: Ranks, like: nn.Module) -> nn.Module:
    """Build the layers with random weights that keep activations in scale, to be timed."""
    chain = empty_chain(geometry, scheme, ranks, like)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in chain.parameters():
            fan_in = max(tensor[0].numel(), 1)
            values = torch.randn(tensor.shape, generator=generator) / fan_in**0.5
            tensor.copy_(values)
    return chain


def replaced(
    model: nn.Module, sites: Mapping[str, LayerSite], chains: Mapping[str, nn.Module]
) -> nn.Module:
    """Return a copy of the model with built chains in the place of the named layers."""
    new = copy.deepcopy(model)
    for name, chain in chains.items():
        if name == "":
            return chain
        for alias in sites[name].aliases:
            replace_module(new, alias, chain)
    return new


def as_saved(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy as it will be read back: in its dtype, and row by row in memory.

    Kernels are chosen by strides, and those of an axis of length 1 (rank 1) outlive
    ``contiguous()`` but not a file: the same numbers would then give outputs that round otherwise.
    """
    copied = cast(copy.deepcopy(model), dtype)
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return copied


def rewrite(
    model: nn.Module,
    sites: Mapping[str, LayerSite],
    chains: Mapping[str, Chain],
    kept: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> nn.Module:
    """Return a copy of the model with the named layers replaced; the model itself is untouched.

    Args:
        model: The network, norms folded.
        sites: Its sites by name.
        chains: What becomes of which site.
        kept: New values for parameters of layers that stay.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    built = {n: build_chain(sites[n].geometry, chain, modules[n]) for n, chain in chains.items()}
    new = replaced(model, sites, built)
    with torch.no_grad():
        for name, weights in (kept or {}).items():
            for parameter, value in weights.items():
                new.get_submodule(name).get_parameter(parameter).copy_(value)
    return new
