"""Networks compiled ahead of time by AOTInductor, for the kind of machine that they are made on."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch.export import ExportedProgram

from compress.deploy.runtimes import Session
from compress.errors import ConfigError, ModelError, one_line
from compress.libraries.record import quiet
from compress.running.structure import tensors

_COMPILERS = ("g++", "c++", "clang++")


def require_compiler(flag: str) -> None:
    """Find out whether a C++ compiler is at hand.

    Args:
        flag: What needs it, for the message.

    Raises:
        ConfigError: There is none.
    """
    if not any(map(shutil.which, _COMPILERS)):
        raise ConfigError(
            f"{flag} needs a C++ compiler, and none is found ({', '.join(_COMPILERS)}); install "
            "one, or leave it out."
        )


def compiled_package(program: ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    """Compile a network and return the package that `aoti_load_package` reads.

    Raises:
        ModelError: It cannot be compiled.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pt2"
        settings = {"aot_inductor.metadata": dict(metadata)}
        try:
            with quiet():
                aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
        except Exception as error:  # of inductor, of the C++ compiler
            raise ModelError(
                f"AOTInductor cannot compile the network: {type(error).__name__}: "
                f"{one_line(error)[:300]}. Export it with --to pt2, which compiles nothing."
            ) from error
        return path.read_bytes()


def package_session(content: bytes) -> Session:
    """Load a package of this process's own making."""
    module = aoti_load_package(io.BytesIO(content))

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        with torch.inference_mode():
            return list(tensors(module(*inputs.values())).values())

    return run
