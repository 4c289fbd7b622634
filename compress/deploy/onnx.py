"""ONNX models: made by torch's exporter, checked, and with nothing of the machine in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from compress.deploy.program import Traced
from compress.errors import ConfigError, ModelError, one_line
from compress.libraries.record import quiet, require

EXTRA = "onnx"
BATCH = "batch"
NEEDED_BY = "ONNX files"
# Protocol buffers, and with them ONNX files that hold their weights, end below 2 GB.
LARGEST_FILE = 2**31 - 2**20
# What the wrapped network's weights are called beyond their own names.
_WRAPPED = "model."


@dataclass(frozen=True)
class OnnxModel:
    """A network as ONNX.

    Attributes:
        proto: The ``onnx.ModelProto``, with its weights.
        opset: The version of ONNX's operators.
        program: The graph that it was translated from; values bear the names of its nodes.
    """

    proto: Any
    opset: int
    program: ExportedProgram

    def content(self) -> bytes:
        """Return the bytes of the file."""
        serialised: bytes = self.proto.SerializeToString(deterministic=True)
        return serialised


def to_onnx(
    traced: Traced, metadata: Mapping[str, str], opset: int | None = None, *, checked: bool = True
) -> OnnxModel:
    """Translate a traced network.

    Args:
        traced: The network.
        metadata: What the file says of itself (``metadata_props``).
        opset: The version of ONNX's operators; None for the exporter's own choice.
        checked: Whether ONNX's own checker looks at it, which takes seconds for large networks.

    Raises:
        ModelError: An operator cannot be translated, the file would be too large, or ONNX's own
            checker finds it wrong.
        ConfigError: The network needs a newer opset.
    """
    onnx = require("onnx", EXTRA, NEEDED_BY)
    require("onnxscript", EXTRA, NEEDED_BY)
    weights = (*traced.program.state_dict.values(), *traced.program.constants.values())
    size = sum(t.numel() * t.element_size() for t in weights if isinstance(t, torch.Tensor))
    if size > LARGEST_FILE:
        raise ModelError(
            f"The network has {size:,} bytes of weights, and an ONNX file can hold "
            f"{LARGEST_FILE:,}. Export it with --to pt2."
        )
    try:
        with quiet():
            exported = torch.onnx.export(
                traced.program, dynamo=True, verbose=False, opset_version=opset,
                input_names=list(traced.inputs), output_names=list(traced.outputs),
            )  # fmt: skip
    except Exception as error:  # of torch, of onnxscript, of whatever translates one operator
        raise ModelError(_why_not(error)) from error
    assert exported is not None
    assert exported.exported_program is not None
    _prepare(exported.model)
    proto = exported.model_proto
    found = next(each.version for each in proto.opset_import if each.domain in ("", "ai.onnx"))
    if opset is not None and found != opset:
        raise ConfigError(
            f"The network cannot be written with opset {opset}: the exporter needs opset {found} "
            f"for its operators. Pass --opset {found}, or leave it out."
        )
    _name_batch(proto)
    for key, value in sorted(metadata.items()):
        proto.metadata_props.add(key=key, value=value)
    if checked:
        _check(onnx, proto)
    return OnnxModel(proto, found, exported.exported_program)


def _check(onnx: Any, proto: Any) -> None:
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # onnx.checker.ValidationError, and those of shape inference
        raise ModelError(
            f"onnx.checker finds the exported network wrong: {one_line(error)[:500]}. This is a "
            "defect of torch's exporter or of its use here."
        ) from error


def _prepare(model: Any) -> None:
    """Give weights the network's own names, and drop what tells of the code and the machine."""
    taken = {value.name for value in model.graph.inputs}
    taken |= {value.name for node in model.graph.all_nodes() for value in node.outputs}
    for value in list(model.graph.initializers.values()):
        own = value.name.removeprefix(_WRAPPED)
        if own not in taken:  # by what an operator computes, such as "add"
            value.name = own
    for node in model.graph.all_nodes():
        for holder in (node, *node.outputs):
            holder.metadata_props.clear()
    for holder in (model, model.graph, *model.graph.inputs, *model.graph.initializers.values()):
        holder.metadata_props.clear()


def _name_batch(proto: Any) -> None:
    """Call the open axis what it is; the exporter names it after a symbol of its own."""
    graph = proto.graph
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if symbol and axis.dim_param == symbol:
                axis.dim_param = BATCH


def _why_not(error: BaseException) -> str:
    cause, said = error, one_line(error)
    while cause.__cause__ is not None:  # torch wraps the one line that matters in a page
        cause = cause.__cause__
    if cause is not error:
        said = f"{type(cause).__name__}: {one_line(cause)}"
    return (
        f"torch's exporter cannot write the network as ONNX: {said[:500]}. Export it with "
        "--to pt2, or with another --opset."
    )
