"""What a checkpoint's file holds, whatever its format: safetensors or a file of torch.save."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CheckpointError
from compress.files import SEAL_KEY, BrokenSeal, check_tensors
from compress.inputs.checkpoint.declared import check_declared
from compress.inputs.checkpoint.inert import STAND_INS
from compress.untrusted import Unreadable
from compress.untrusted.tensors import read_tensors

ARTEFACT_KEY = "compress"  # in the safetensors header of this package's own results
RESAVE = (
    "re-save only the weights, where you trust the file, with "
    'torch.save(model.state_dict(), "weights.pt") or safetensors'
)
_SHOWN = 20


def read_content(path: Path) -> Mapping[Any, Any]:
    """Return what one file holds; its content decides the format, not its name.

    Raises:
        CheckpointError: It is missing, empty, truncated, a git-lfs pointer, of no known format,
            needs code to load, or is an already compressed result.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read: {error.strerror}; check the path."
        ) from error
    if size == 0:
        raise CheckpointError(f"The checkpoint {path} is empty (0 bytes); fetch it again.")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"The checkpoint {path} is a git-lfs pointer, not the weights; run 'git lfs pull'."
        )
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors(path, size)
    if start.startswith(b"PK") or start[:1] == b"\x80":
        return _read_torch(path)
    if path.suffix == ".onnx":
        raise CheckpointError(
            f"The checkpoint {path} is an ONNX file, which holds the network with its weights: "
            f"pass --model onnx:{path} as well."
        )
    kind = "text" if _is_text(start) else "data of an unknown format"
    raise CheckpointError(
        f"The checkpoint {path} holds {kind}, neither safetensors nor a file of torch.save; "
        "if it was downloaded, the server may have sent an error page: look inside and fetch it "
        "again."
    )


def _is_text(start: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\r\n" for byte in start)


def _read_safetensors(path: Path, size: int) -> dict[str, Tensor]:
    try:
        found = read_tensors(path)
        if SEAL_KEY in found.metadata:
            check_tensors(path)
    except BrokenSeal as error:
        raise CheckpointError(f"The checkpoint {path} {error}; fetch it again.") from error
    except (OSError, Unreadable) as error:
        raise CheckpointError(
            f"The checkpoint {path} ({size} bytes) is truncated, damaged or no safetensors file: "
            f"{error}; fetch it again."
        ) from error
    if ARTEFACT_KEY in found.metadata:
        raise CheckpointError(
            f"{path} is an already compressed result, not a checkpoint to compress; look "
            "at it with 'compress evaluate' or 'compress verify', or load it in Python "
            "with compress.load."
        )
    return found.tensors


# What torch's reader raises, depending on the byte that a file ends at.
_DAMAGE = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, struct.error,
)  # fmt: skip


def _read_torch(path: Path) -> Mapping[Any, Any]:
    try:
        check_declared(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([*STAND_INS]):
            # torch warns of an unusual pickle protocol and of TorchScript; both end in an error
            # here or load well, and the warning would only come before our own words.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|\bof type (\S+)|class (\S+) was not", str(error))
        if found is None and "Unsupported" not in str(error):
            raise damaged(path, error) from error
        name = next((g for g in found.groups() if g), "") if found else ""
        raise CheckpointError(
            f"The checkpoint {path} needs code to load{f' ({name})' if name else ''} and is "
            "refused, because such a file can run anything; nothing in it was run. If it holds a "
            f"whole module or objects of a training program, {RESAVE}."
        ) from error
    except _DAMAGE as error:
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"The checkpoint {path} is a TorchScript archive, which holds code; {RESAVE}."
            ) from error
        raise damaged(path, error) from error
    if isinstance(content, Tensor):
        raise CheckpointError(f"The checkpoint {path} holds one bare tensor, no names; {RESAVE}.")
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"The checkpoint {path} holds a {type(content).__name__}, no state dict; {RESAVE}."
        )
    return content


def damaged(path: Path, error: BaseException) -> CheckpointError:
    """Return the error for a file whose content is not what it should be."""
    text = " ".join(str(error).split()).partition(". ")[0].rstrip(".") or type(error).__name__
    return CheckpointError(
        f"The checkpoint {path} ({path.stat().st_size} bytes) is truncated or damaged: {text}; "
        "fetch or save it again."
    )


def listed(names: Sequence[str]) -> str:
    """Return the first 20 names and how many there are."""
    shown = ", ".join(names[:_SHOWN])
    if len(names) == 1:
        return shown
    return f"{shown}{', ...' if len(names) > _SHOWN else ''} ({len(names)} in all)"
