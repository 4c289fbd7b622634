"""Safetensors files from outside. Not imported with the package, because it imports torch."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.untrusted.text import Unreadable

MOST_AXES = 64  # what torch computes with

# What safetensors and torch raise of headers that are valid JSON and no sense.
_DAMAGE = (
    SafetensorError, RuntimeError, ValueError, TypeError, LookupError, AttributeError,
    OverflowError, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class TensorFile:
    """What a safetensors file holds: tensors by name, and its header's words."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_tensors(path: str | Path) -> TensorFile:
    """Read a safetensors file whole. Tensors take as many bytes as the file has for them.

    Raises:
        OSError: It cannot be opened or read.
        Unreadable: It is truncated, damaged or no safetensors file, or a tensor has more than
            `MOST_AXES` axes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            # The opened file is not a mapping: it has keys() and cannot be iterated.
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except _DAMAGE as error:
        raise Unreadable(_reason(error)) from error
    many = next((name for name, tensor in tensors.items() if tensor.ndim > MOST_AXES), None)
    if many is not None:
        raise Unreadable(f"its tensor {many[:60]!r} has more than {MOST_AXES} axes")
    return TensorFile(tensors, metadata)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the words in a safetensors file's header.

    Raises:
        OSError: It cannot be opened or read.
        Unreadable: It is truncated, damaged or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except OSError:
        raise
    except _DAMAGE as error:
        raise Unreadable(_reason(error)) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
