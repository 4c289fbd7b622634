"""The model's graph: tracing, and folding each BatchNorm into the layer that only it reads."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass

from torch import Tensor, fx, nn

from compress.layers import kind_of
from compress.linalg.kernels import BatchNorm, fold_batch_norm
from compress.running.forward import evaluation_mode
from compress.running.modules import module_names, replace_module

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# Where torch.fx puts tensors that a forward makes without looking at its input.
_CONSTANT = "_tensor_constant"


class _Tracer(fx.Tracer):
    """Traces through the user's modules and stops at torch's and this package's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name == "model" and isinstance(self.root, _Called):
            return False
        # Unpacked attention stays open: its projections are layers like any other.
        home = type(m).__module__
        own = home.startswith("compress.modules") and "attention" not in home
        return own or super().is_leaf_module(m, module_qualified_name)


class _Called(nn.Module):
    """A model called with only its input, so that what else it could take has its default.

    Tracing would make proxies of those arguments, and a forward that asks whether one ``is None``
    would take the wrong branch.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> object:
        return self.model(x)


def _strip(graph: fx.Graph, prefix: str) -> None:
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = str(node.target).removeprefix(prefix)


def trace(model: nn.Module) -> fx.Graph | None:
    """Return the graph of the model in eval mode, or None where it cannot be traced.

    Data-dependent control flow is what usually stands in the way; nothing is lost then but the
    reach of what needs a graph (folding, refitting).
    """
    try:
        with evaluation_mode(model):  # or what the forward keeps of its proxies would stay
            root = _Called(model) if len(inspect.signature(model.forward).parameters) > 1 else model
            graph = _Tracer().trace(root)
            constants = {n: v for n, v in vars(root).items() if n.startswith(_CONSTANT)}
        vars(model).update(constants)
        if root is not model:
            _strip(graph, "model.")
        graph.lint()
    except KeyboardInterrupt:
        raise
    except BaseException:  # tracing runs the user's forward on proxies, which may raise anything
        return None
    return graph


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
        The pairs, in order. The norms are ``nn.Identity`` now; their layers have a bias.
    """
    names = module_names(model)
    pairs = _pairs_of_graph(model, graph) if graph is not None else _pairs_of_sequences(model)
    folded = []
    for layer, norm in pairs:
        kind = kind_of(layer)
        if kind is None or not _foldable(model, layer, norm):
            continue
        fold_into(layer, norm)
        for name in names[norm]:
            replace_module(model, name, nn.Identity())
        folded.append(FoldedPair(names[layer][0], names[norm][0]))
    return tuple(folded)


def fold_into(layer: nn.Module, norm: nn.Module) -> None:
    """Give a layer the weight and bias that it has together with the norm behind it."""
    assert isinstance(norm, _NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d)
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
        isinstance(norm, _NORMS)
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
        if node.op != "call_module" or type(modules[str(node.target)]) not in _NORMS:
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
            if once and type(norm) in _NORMS and not isinstance(layer, nn.Linear):
                pairs.append((layer, norm))
    return pairs
