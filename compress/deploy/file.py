"""A network as a file, still in memory, and the runtimes that are at hand to load it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.deploy.compiled import compiled_package, package_session
from compress.deploy.onnx import OnnxModel, to_onnx
from compress.deploy.program import Traced, trace
from compress.deploy.runtimes import SESSIONS, installed, program_session
from compress.errors import ModelError

ONNX, PROGRAM, COMPILED = "onnx", "pt2", "aoti"
_TORCH_S = {PROGRAM: "torch.export", COMPILED: "AOTInductor"}
_ONNX_DTYPES = (torch.float32, torch.float16)
# What checks an ONNX file; a program is checked by torch.
_CHECKING = "onnxruntime"


@dataclass(frozen=True)
class Form:
    """What kind of file a network becomes.

    Attributes:
        target: ``"onnx"``, ``"pt2"`` or ``"aoti"``.
        opset: The version of ONNX's operators; None for the exporter's own choice.
        batch: The batch size that the file takes; None for any.
    """

    target: str
    opset: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class ExportedFile:
    """An exported network.

    Attributes:
        content: The bytes of the file.
        network: The file, loaded again by the runtime that checks it.
        traced: What it was made from.
        onnx: The ONNX model; None for a program.
        target: The kind of file.
    """

    content: bytes
    network: nn.Module
    traced: Traced
    onnx: OnnxModel | None = None
    target: str = ONNX

    def on_runtimes(
        self, only: Sequence[str] | None = None
    ) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
        """Load the file into runtimes.

        Args:
            only: Which ones; None for all that are installed.

        Returns:
            The networks by the runtimes' names, and why some do not take the file.
        """
        if self.onnx is None:
            return {_TORCH_S[self.target]: self.network}, ()
        reference = next(self.network.parameters())
        own = {_CHECKING: self.network}
        return _loaded(self.content, self.traced, reference, only, own)


def make_file(
    model: nn.Module, example: Any, form: Form, metadata: Mapping[str, str]
) -> ExportedFile:
    """Export a network and load what came out.

    Args:
        model: The network, contiguous and on the CPU, in the dtype that is to be exported.
        example: As for `trace`.
        form: The kind of file.
        metadata: What the file says of itself.

    Raises:
        ModelError, ConfigError: As `trace` and `to_onnx`; or the runtime does not take the file.
    """
    reference = next(model.parameters())
    if form.target == ONNX:
        _require_floats_of_onnx(reference)
    traced = trace(model, example, form.batch)
    if form.target == PROGRAM:
        # torch would save the example with the program, and with it somebody's images.
        traced.program.example_inputs = None
        buffer = io.BytesIO()
        named = {f"{key}.json": value for key, value in metadata.items()}
        torch.export.save(traced.program, buffer, extra_files=named)
        content = buffer.getvalue()
        network = traced.on(program_session(content), reference)
        return ExportedFile(content, network, traced, target=PROGRAM)
    if form.target == COMPILED:
        content = compiled_package(traced.program, metadata)
        network = traced.on(package_session(content), reference)
        return ExportedFile(content, network, traced, target=COMPILED)
    onnx = to_onnx(traced, metadata, form.opset)
    content = onnx.content()
    network = traced.on(SESSIONS[_CHECKING](content), reference)
    return ExportedFile(content, network, traced, onnx)


def load_to_be_timed(
    model: nn.Module, example: Any, batch: int | None, only: Sequence[str] | None = None
) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    """Export a network as ONNX and load it into runtimes, without a check of what it computes.

    Args:
        model: As for `make_file`.
        example: As for `trace`.
        batch: The batch size; None leaves it open.
        only: As for `ExportedFile.on_runtimes`.

    Returns:
        As `ExportedFile.on_runtimes`.

    Raises:
        ModelError: As `trace` and `to_onnx`.
    """
    reference = next(model.parameters())
    _require_floats_of_onnx(reference)
    traced = trace(model, example, batch)
    content = to_onnx(traced, {}, checked=False).content()
    return _loaded(content, traced, reference, only, {})


def _require_floats_of_onnx(reference: Tensor) -> None:
    if reference.dtype not in _ONNX_DTYPES:
        raise ModelError(
            f"The network's weights are {str(reference.dtype).removeprefix('torch.')}, and ONNX "
            "Runtime computes in float32 and float16 alone. Export it with --to pt2."
        )


def _loaded(
    content: bytes,
    traced: Traced,
    reference: Tensor,
    only: Sequence[str] | None,
    already: Mapping[str, nn.Module],
) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    """Load a file into runtimes, but for those that have loaded it already."""
    networks, problems = {}, []
    for name in [each for each in SESSIONS if installed(each)] if only is None else only:
        try:
            networks[name] = (
                already[name] if name in already else traced.on(SESSIONS[name](content), reference)
            )
        except ModelError as error:
            problems.append(str(error))
    return networks, tuple(problems)
