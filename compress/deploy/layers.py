"""Single layers and chains as ONNX files, written directly: exporting each takes a second."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compress.libraries.record import require

INPUT, OUTPUT = "input", "output"
# What every ONNX Runtime and OpenVINO that this package is installed with can read.
OPSET, IR_VERSION = 18, 10
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def layer_file(layer: nn.Module, shape: Sequence[int]) -> bytes | None:
    """Return the ONNX file of a layer, or of a chain of layers, in float32.

    Args:
        layer: A convolution, transposed or not, a linear layer, or an `nn.Sequential` of them.
        shape: Of its input ``[N, …]``, which is fixed in the file.

    Returns:
        None where it is made of something else, or pads with something else than zeros.

    Raises:
        ModelError: The package onnx is not installed.
    """
    parts = list(layer) if isinstance(layer, nn.Sequential) else [layer]
    if not parts or not all(map(_is_plain, parts)):
        return None
    onnx = require("onnx", "onnx", "Layers timed on another runtime")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    nodes, weights, value = [], [], INPUT
    for index, part in enumerate(parts):
        for node in _nodes(part, f"layer{index}", len(shape)):
            names = [f"{node.name}.{key}" for key in node.weights]
            given = zip(names, node.weights.values(), strict=True)
            weights += [numpy_helper.from_array(_array(w), name) for name, w in given]
            made = f"{node.name}.output"
            nodes.append(
                helper.make_node(node.operator, [value, *names], [made], **node.attributes)
            )
            value = made
    nodes[-1].output[0] = OUTPUT
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info(INPUT, float32, list(shape))],
        [helper.make_tensor_value_info(OUTPUT, float32, None)],
        weights,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    content: bytes = model.SerializeToString()
    return content


@dataclass(frozen=True)
class _Node:
    """An operator of one input and some weights."""

    name: str
    operator: str
    weights: Mapping[str, Tensor]
    attributes: dict[str, Any]


def _is_plain(part: nn.Module) -> bool:
    if type(part) in (*_CONVOLUTIONS, *_TRANSPOSED):
        return str(part.padding_mode) == "zeros"
    return type(part) is nn.Linear


def _nodes(part: nn.Module, name: str, axes: int) -> Iterator[_Node]:
    """The operators that torch's exporter writes for a layer whose input has so many axes."""
    weight = part.get_parameter("weight")
    bias = {} if part._parameters.get("bias") is None else {"bias": part.get_parameter("bias")}
    if not isinstance(part, nn.Linear):
        operator = "Conv" if type(part) in _CONVOLUTIONS else "ConvTranspose"
        yield _Node(name, operator, {"weight": weight, **bias}, _attributes(part))
    elif axes == 2:
        yield _Node(name, "Gemm", {"weight": weight, **bias}, {"transB": 1})
    else:
        yield _Node(name, "MatMul", {"weight": weight.mT}, {})
        if bias:
            yield _Node(f"{name}.add", "Add", bias, {})


def _attributes(part: Any) -> dict[str, Any]:
    found = {
        "kernel_shape": list(part.kernel_size),
        "strides": list(part.stride),
        "dilations": list(part.dilation),
        "group": part.groups,
        "pads": _pads(part),
    }
    if type(part) in _TRANSPOSED:
        found["output_padding"] = list(part.output_padding)
    return found


def _pads(part: Any) -> list[int]:
    """Zeros before each axis, then zeros after each."""
    if part.padding == "valid":
        return [0] * (2 * len(part.kernel_size))
    if part.padding == "same":  # torch has the odd one after
        sizes = zip(part.dilation, part.kernel_size, strict=True)
        whole = [dilation * (kernel - 1) for dilation, kernel in sizes]
        return [*(w // 2 for w in whole), *(w - w // 2 for w in whole)]
    return [*part.padding, *part.padding]


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().float().contiguous().numpy()
