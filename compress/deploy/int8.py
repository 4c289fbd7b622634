"""Eight bits: ONNX Runtime's static quantiser, told which layers to leave as they are."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.deploy.onnx import OnnxModel
from compress.errors import ModelError, one_line
from compress.libraries.record import quiet, require

# Operators with weights, which hold a network's MACs and nearly all of its bytes.
_WITH_WEIGHTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class Quantiser:
    """Makes versions of an ONNX model whose numbers have eight bits.

    Weights have a scale for each channel and activations one for each tensor, between the least
    and the greatest value of the calibration inputs. The file says so by pairs of
    ``QuantizeLinear`` and ``DequantizeLinear``, which every runtime for ONNX reads.

    Args:
        model: The model.
        inputs: Batches to calibrate on, by the inputs' names.
        folder: An empty folder, for the files that the quantiser works with.

    Attributes:
        layers: The nodes that can be quantised, with the names of their layers.
        macs: Multiply-accumulates of each, for one image.

    Raises:
        ModelError: There is none.
    """

    def __init__(
        self, model: OnnxModel, inputs: Sequence[Mapping[str, Tensor]], folder: Path
    ) -> None:
        self._quantisation = require("onnxruntime.quantization", "onnx", "Files in eight bits")
        self._onnx = require("onnx", "onnx", "Files in eight bits")
        self._inputs, self._folder, self._model = inputs, folder, model
        (folder / "float.onnx").write_bytes(model.content())
        stored = {tensor.name: tensor for tensor in model.proto.graph.initializer}
        inferred = self._onnx.shape_inference.infer_shapes(model.proto)
        shapes = {value.name: _shape(value) for value in _values(inferred.graph)}
        self.layers: dict[str, str] = {}
        self.macs: dict[str, int] = {}
        for node in model.proto.graph.node:
            weight = next((stored[name] for name in node.input[1:2] if name in stored), None)
            if node.op_type in _WITH_WEIGHTS and weight is not None:
                self.layers[node.name] = weight.name.removesuffix(".weight")
                self.macs[node.name] = _macs(node, math.prod(weight.dims), shapes)
        if not self.layers:
            raise ModelError(
                "The network has no layer with weights that can be quantised, so it cannot be "
                "exported in eight bits; leave out --int8."
            )

    def only(self, node: str) -> bytes:
        """Return the model with one layer in eight bits."""
        return self._quantised(nodes_to_quantize=[node])

    def without(self, nodes: Collection[str]) -> bytes:
        """Return the model in eight bits, but for some layers."""
        return self._quantised(nodes_to_exclude=list(nodes))

    def _quantised(self, **which: Any) -> bytes:
        quantisation = self._quantisation
        target = self._folder / "int8.onnx"
        known = inspect.signature(quantisation.quantize_static).parameters
        if "calibration_cache_path" in known:  # else every version is calibrated anew
            which["calibration_cache_path"] = str(self._folder / "ranges.json")
        try:
            with quiet():
                # Processors without instructions for eight bits (VNNI and the like) add products of
                # weights and activations in 16 bits. With weights of full range these overflow
                # there, silently; of half the range they do not. Unsigned activations are what
                # such instructions take.
                quantisation.quantize_static(
                    self._folder / "float.onnx", target, _reader(quantisation, self._inputs),
                    quant_format=quantisation.QuantFormat.QDQ, per_channel=True,
                    activation_type=quantisation.QuantType.QUInt8,
                    weight_type=quantisation.QuantType.QInt8, reduce_range=True, **which,
                )  # fmt: skip
        except Exception as error:  # of onnxruntime, onnx or numpy, of no common base
            raise ModelError(
                f"ONNX Runtime cannot quantise the network: {one_line(error)[:500]}."
            ) from error
        return target.read_bytes()

    def finished(self, content: bytes, metadata: Mapping[str, str]) -> OnnxModel:
        """Return one of the versions with the model's own metadata and some more."""
        proto = self._onnx.load_model_from_string(content)
        own = {entry.key: entry.value for entry in self._model.proto.metadata_props}
        del proto.metadata_props[:]
        for key, value in sorted({**own, **metadata}.items()):
            proto.metadata_props.add(key=key, value=value)
        opset = next(e.version for e in proto.opset_import if e.domain in ("", "ai.onnx"))
        return OnnxModel(proto, opset, self._model.program)


def _reader(quantisation: Any, inputs: Sequence[Mapping[str, Tensor]]) -> Any:
    """The calibration inputs as the quantiser wants to read them."""

    class Reader(quantisation.CalibrationDataReader):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self.left = iter(inputs)

        def get_next(self) -> dict[str, Any] | None:
            """Return the next batch, and None behind the last."""
            found = next(self.left, None)
            return None if found is None else {n: t.numpy() for n, t in found.items()}

    return Reader()


def _values(graph: Any) -> Iterator[Any]:
    yield from (*graph.input, *graph.value_info, *graph.output)


def _shape(value: Any) -> list[int]:
    """The axes of a value for a batch of one image."""
    return [axis.dim_value or 1 for axis in value.type.tensor_type.shape.dim]


def _macs(node: Any, weights: int, shapes: Mapping[str, list[int]]) -> int:
    """How often each weight is used, times how many there are."""
    if node.op_type == "Conv":
        return weights * math.prod(shapes.get(node.output[0], [])[2:])
    if node.op_type == "ConvTranspose":
        return weights * math.prod(shapes.get(node.input[0], [])[2:])
    return weights * math.prod(shapes.get(node.output[0], [])[:-1])
