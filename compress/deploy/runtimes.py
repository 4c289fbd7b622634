"""Exported networks as modules, so that whatever measures a network measures them too."""

from __future__ import annotations

import importlib.metadata
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError, one_line
from compress.libraries.record import quiet, require
from compress.running.structure import rebuilt, tensors

_LONGEST_REASON = 200
# A session takes the input tensors by their names, and gives the output tensors in order.
Session = Callable[[Mapping[str, Tensor]], list[Tensor]]


class OnRuntime(nn.Module):
    """A network that another runtime computes; it takes and returns what the original does.

    Args:
        session: The runtime's.
        inputs: The names of the input tensors, in the order of `tensors`.
        like: What the original returns, for its structure.
        reference: A weight, by which inputs are put into the right type.
    """

    def __init__(
        self, session: Session, inputs: Sequence[str], like: Any, reference: Tensor
    ) -> None:
        super().__init__()
        self.session, self.inputs, self.like = session, tuple(inputs), like
        # What measures a network asks its first parameter for device and type.
        self.reference = nn.Parameter(reference.detach().cpu().flatten()[:1].clone())

    def forward(self, *by_position: Any, **by_name: Any) -> Any:
        """Compute the outputs of a batch, as the original's structure.

        Raises:
            ModelError: The runtime fails.
        """
        given = tensors(by_name if by_name else by_position).values()
        return rebuilt(self.like, self.session(dict(zip(self.inputs, given, strict=True))))


def onnx_session(content: bytes) -> Session:
    """Load an ONNX file into ONNX Runtime, with the threads that torch computes with.

    Raises:
        ModelError: ONNX Runtime is not installed, or does not take the file.
    """
    runtime = require("onnxruntime", "onnx", "Files for ONNX Runtime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what it cannot do, it raises
    # Else its threads go on waiting busily after a batch, and delay whatever takes the next turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own types, of no common base
        raise ModelError(f"ONNX Runtime does not take the network: {_reason(error)}.") from error

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        try:
            found = session.run(None, _arrays(inputs))
        except Exception as error:
            raise ModelError(f"ONNX Runtime fails at the network: {_reason(error)}.") from error
        return [torch.from_numpy(array) for array in found]

    return run


def openvino_session(content: bytes) -> Session:
    """Load an ONNX file into OpenVINO, in the precision of its weights; as `onnx_session`."""
    openvino = require("openvino", "openvino", "Files for OpenVINO")
    hints = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # else it computes in bfloat16 where the CPU can
        "PERFORMANCE_HINT": "LATENCY",
    }
    try:
        with quiet():
            core = openvino.Core()
            model = core.compile_model(core.read_model(io.BytesIO(content)), "CPU", hints)
    except Exception as error:
        raise ModelError(f"OpenVINO does not take the network: {_reason(error)}.") from error
    request = model.create_infer_request()

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        try:
            found = request.infer(_arrays(inputs))
        except Exception as error:
            raise ModelError(f"OpenVINO fails at the network: {_reason(error)}.") from error
        return [torch.tensor(found[port]) for port in model.outputs]

    return run


def program_session(content: bytes) -> Session:
    """Load the bytes of a program that `torch.export.save` wrote, of this process's own making."""
    module = torch.export.load(io.BytesIO(content)).module()

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        return list(tensors(module(*inputs.values())).values())

    return run


def _arrays(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inputs as runtimes read them: row by row."""
    return {name: tensor.detach().contiguous().numpy() for name, tensor in inputs.items()}


def _reason(error: Exception) -> str:
    return one_line(error)[:_LONGEST_REASON]


SESSIONS: dict[str, Callable[[bytes], Session]] = {
    "onnxruntime": onnx_session,
    "openvino": openvino_session,
}


def installed(runtime: str) -> bool:
    """Whether a runtime is installed."""
    try:
        importlib.metadata.version(runtime)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
