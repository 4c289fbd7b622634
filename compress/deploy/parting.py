"""Where an exported network and the graph it was made from part, found by bisection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from compress.deploy.difference import Difference
from compress.deploy.onnx import OnnxModel
from compress.deploy.runtimes import onnx_session
from compress.libraries.record import require
from compress.running.structure import tensors


def first_parting(model: OnnxModel, inputs: Any, names: tuple[str, ...], most: float) -> str:
    """Name the first value at which ONNX Runtime's and torch's numbers part.

    Bisection: what lies before the first wrong value is right, and what lies behind it is taken to
    be wrong, so that one value in the middle tells on which side to go on.

    Args:
        model: The ONNX model with the graph it was translated from.
        inputs: A batch, as the network takes it.
        names: The names of its tensors in the file.
        most: The largest relative difference that is no parting.

    Returns:
        The value's name with the operator that computes it, or ``""`` where none of the values
        that both have parts.
    """
    expected = _Recorder(model).record(inputs)
    operators = {out: node.op_type for node in model.proto.graph.node for out in node.output}
    shared = [name for name in expected if name in operators]
    given = dict(zip(names, tensors(inputs).values(), strict=True))

    def parts(name: str) -> bool:
        found = _value(model.proto, name, given)
        if found.shape != expected[name].shape:
            return True
        difference = Difference()
        difference.add(expected[name], found)
        return difference.largest > most

    if not shared or not parts(shared[-1]):
        return ""
    right, wrong = -1, len(shared) - 1
    while wrong - right > 1:
        middle = (right + wrong) // 2
        right, wrong = (right, middle) if parts(shared[middle]) else (middle, wrong)
    name = shared[wrong]
    return f"{name} ({operators[name]})"


class _Recorder(Interpreter):
    """Runs a traced graph and keeps every real tensor by the name of its node."""

    def __init__(self, model: OnnxModel) -> None:
        super().__init__(model.program.module())
        self.values: dict[str, Tensor] = {}

    def record(self, inputs: Any) -> Mapping[str, Tensor]:
        """Return the values for a batch, in the order they are computed."""
        with torch.no_grad():
            self.run(*tensors(inputs).values())
        return self.values

    def run_node(self, n: Node) -> Any:
        """Compute one node."""
        found = super().run_node(n)
        if n.op == "call_function" and isinstance(found, Tensor) and found.is_floating_point():
            self.values[n.name] = found
        return found


def _value(proto: Any, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """What ONNX Runtime computes for one value inside the network."""
    onnx = require("onnx", "onnx", "ONNX files")
    asked = onnx.ModelProto()
    asked.CopyFrom(proto)
    del asked.graph.output[:]
    asked.graph.output.append(onnx.ValueInfoProto(name=name))
    return onnx_session(asked.SerializeToString())(inputs)[0]
