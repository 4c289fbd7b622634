"""Folding each BatchNorm into the layer that only it reads."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor, fx, nn

from compress.layers import kind_of
from compress.linalg.kernels import BatchNorm, fold_batch_norm
from compress.network.norms import NORMS, after_norm
from compress.running.modules import module_names, replace_module


@dataclass(frozen=True)
class FoldedPair:
    """A BatchNorm that was folded into a layer: their first names."""

    layer: str
    norm: str


def fold_batch_norms(model: nn.Module, graph: fx.Graph | None) -> tuple[FoldedPair, ...]:
    """Fold every BatchNorm whose input is one layer's output and nothing else's, in place.

    Args:
        model: The network, in eval mode; changed.
        graph: Its graph; without one only neighbours in ``nn.Sequential`` are folded.

    Returns:
        The pairs, in order. What is left of the norms (see `after_norm`) stands in their place;
        their layers have a bias.
    """
    names = module_names(model)
    pairs = _pairs_of_graph(model, graph) if graph is not None else _pairs_of_sequences(model)
    folded = []
    for layer, norm in pairs:
        kind = kind_of(layer)
        if kind is None or not _foldable(model, layer, norm):
            continue
        fold_into(layer, norm)
        rest = after_norm(norm)
        assert rest is not None  # or it would not be among the pairs
        for name in names[norm]:
            replace_module(model, name, rest)
        folded.append(FoldedPair(names[layer][0], names[norm][0]))
    return tuple(folded)


def fold_into(layer: nn.Module, norm: nn.Module) -> None:
    """Give a layer the weight and bias that it has together with the norm behind it."""
    assert isinstance(norm, NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    statistics = BatchNorm(
        norm.running_mean,
        norm.running_var,
        None if norm.weight is None else norm.weight.detach(),
        None if norm.bias is None else norm.bias.detach(),
        norm.eps,
    )
    new_weight, new_bias = fold_batch_norm(
        weight.detach(),
        None if bias is None else bias.detach(),
        statistics,
        transposed=transposed,
        groups=getattr(layer, "groups", 1),
    )
    layer.weight = nn.Parameter(new_weight, requires_grad=weight.requires_grad)
    layer.bias = nn.Parameter(new_bias, requires_grad=weight.requires_grad)


def _foldable(model: nn.Module, layer: nn.Module, norm: nn.Module) -> bool:
    channels = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None)
    hooks = [h for m in (norm, layer) for h in (m._forward_hooks, m._forward_pre_hooks)]
    # Old-style weight and spectral norms compute the weight in a hook and hold it elsewhere.
    weight = layer._parameters.get("weight")
    tied = sum(weight is p for p in _parameters(model)) > 1
    return (
        isinstance(norm, NORMS)
        and norm.running_mean is not None
        and norm.num_features == channels
        and weight is not None
        and not any(hooks)
        and not tied
    )


def _parameters(model: nn.Module) -> list[Tensor]:
    return [p for m in model.modules() for p in m._parameters.values() if p is not None]


# A Linear's channels are its last axis and a BatchNorm1d's the second: the same for two dimensions
# alone, which only a forward pass can tell, so that pair is left as it is.
def _pairs_of_graph(model: nn.Module, graph: fx.Graph) -> list[tuple[nn.Module, nn.Module]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    called: dict[nn.Module, int] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            # Reading a parameter past its module counts as another use of it.
            target = str(node.target)
            owner = target if node.op == "call_module" else target.rpartition(".")[0]
            if owner in modules:
                called[modules[owner]] = called.get(modules[owner], 0) + 1
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or after_norm(modules[str(node.target)]) is None:
            continue
        norm, feeder = modules[str(node.target)], node.args[0] if node.args else None
        if not isinstance(feeder, fx.Node) or feeder.op != "call_module":
            continue
        layer = modules[str(feeder.target)]
        alone = set(feeder.users) == {node} and called[layer] == called[norm] == 1
        if alone and not isinstance(layer, nn.Linear):
            pairs.append((layer, norm))
    return pairs


def _pairs_of_sequences(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    uses: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        uses[module] = uses.get(module, 0) + 1
    pairs = []
    for parent in model.modules():
        if type(parent) is not nn.Sequential:
            continue
        children = list(parent)
        for layer, norm in itertools.pairwise(children):
            once = uses[layer] == uses[norm] == uses[parent] == 1
            if once and after_norm(norm) is not None and not isinstance(layer, nn.Linear):
                pairs.append((layer, norm))
    return pairs
