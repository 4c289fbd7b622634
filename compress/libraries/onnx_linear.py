"""Linear layers in place of the products with a stored matrix that an ONNX file has.

ONNX knows linear layers only for two axes (``Gemm``). For more, exporters write ``MatMul`` with the
transposed weight and ``Add`` with the bias, of which onnx2torch makes modules without weights. Here
they become `torch.nn.Linear` again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

# What may lie between a stored matrix and the product: it gives the same numbers for every input.
_MOVES = frozenset(("OnnxTranspose", "OnnxCopyIdentity", "Identity"))
# Both sides of the comparison are computed in double precision.
_CLOSE = 1e-9


def restore_linear(network: fx.GraphModule) -> None:
    """Put `torch.nn.Linear` in place of products with a stored matrix, and of the sums after them.

    A layer takes their place only if it computes the same on random inputs.

    Args:
        network: What `onnx2torch.convert` made; changed.
    """
    for product in list(network.graph.nodes):
        if _module(network, product, "OnnxMatMul") is not None:
            _restore(network, product)
    _drop_unread(network)
    network.recompile()


def _module(network: fx.GraphModule, node: Any, *kinds: str) -> nn.Module | None:
    """The module that a node calls, where its class is one of these."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or node.kwargs:
        return None
    module = network.get_submodule(str(node.target))
    return module if type(module).__name__ in kinds else None


def _restore(network: fx.GraphModule, product: fx.Node) -> None:
    x, stored = product.args
    if isinstance(x, fx.Node) and _value(network, x) is not None:
        return
    weight = _value(network, stored)
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return
    total, bias = _sum_after(network, product, weight.shape[1])
    if bias is not None and bias.dtype == weight.dtype:
        layer = _linear(weight, bias)
        if _same(network, (product, total), weight, layer):
            network.set_submodule(str(product.target), layer)
            product.args = (x,)
            total.replace_all_uses_with(product)
            network.graph.erase_node(total)
            return
    layer = _linear(weight, None)
    if _same(network, (product,), weight, layer):
        network.set_submodule(str(product.target), layer)
        product.args = (x,)


def _value(network: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor that a node always has, or None where it depends on the input."""
    moves: list[nn.Module] = []
    while (move := _module(network, node, *_MOVES)) is not None:
        moves.append(move)
        node = node.args[0]
    value: Any = None
    if isinstance(node, fx.Node) and node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(network.get_submodule(owner), name)
    elif (constant := _module(network, node, "OnnxConstant")) is not None:
        value = getattr(constant, "value", None)
    if not isinstance(value, Tensor):
        return None
    found: Tensor = value
    for move in reversed(moves):
        found = move(found)
    return found


def _sum_after(
    network: fx.GraphModule, product: fx.Node, outputs: int
) -> tuple[fx.Node, Tensor | None]:
    """The node that alone reads a product and adds a stored vector to it, and that vector."""
    if len(product.users) != 1:
        return product, None
    (total,) = product.users
    added = _module(network, total, "OnnxBinaryMathOperation")
    if getattr(added, "math_op_function", None) is not torch.add or len(total.args) != 2:
        return product, None
    (other,) = [each for each in total.args if each is not product] or [None]
    bias = _value(network, other)
    # A vector with further axes could give the sum more axes than the product has.
    return (total, bias) if bias is not None and bias.shape == (outputs,) else (product, None)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    inputs, outputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.mT.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer.eval()


def _same(
    network: fx.GraphModule, nodes: tuple[fx.Node, ...], weight: Tensor, layer: nn.Linear
) -> bool:
    """Whether a layer computes what the modules of a product and of a sum compute in turn."""
    x = torch.randn(2, 3, len(weight), generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        expected = network.get_submodule(str(nodes[0].target))(x, weight.double())
        for node in nodes[1:]:
            given = [expected if each is nodes[0] else _value(network, each) for each in node.args]
            expected = network.get_submodule(str(node.target))(*given)
        bias = None if layer.bias is None else layer.bias.double()
        found = nn.functional.linear(x, layer.weight.double(), bias)
    if expected.shape != found.shape:
        return False
    scale = float(expected.abs().max()) or 1.0
    return bool(((expected - found).abs() <= _CLOSE * scale).all())


def _drop_unread(network: fx.GraphModule) -> None:
    """Drop what nothing reads any more, so that no weight is there twice."""
    for node in reversed(network.graph.nodes):
        moved = _module(network, node, *_MOVES, "OnnxConstant") is not None
        if not node.users and (moved or node.op == "get_attr"):
            network.graph.erase_node(node)
    network.delete_all_unused_submodules()
    read = {str(node.target) for node in network.graph.nodes if node.op == "get_attr"}
    for name, _ in list(network.named_buffers()):
        owner, _, last = name.rpartition(".")
        if owner == "initializers" and name not in read:
            delattr(network.get_submodule(owner), last)
