"""Reading checkpoints as users have them: safetensors and torch files, wrapped or bare."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CheckpointError
from compress.files import MODEL_FILE, SEAL_KEY, BrokenSeal, check_tensors, sha256_file
from compress.inputs.checkpoint.declared import check_declared
from compress.running.finite import not_finite
from compress.running.modules import dtype_of
from compress.untrusted import Unreadable, check_expansion
from compress.untrusted.tensors import MOST_AXES, read_tensors

CONTAINERS = ("state_dict", "model", "model_state_dict", "ema")
PREFIXES = ("module.", "model.", "_orig_mod.")
ARTEFACT_KEY = "compress"  # in the safetensors header of this package's own results

_SHOWN = 20
# No network nests or names deeper; what does is made to cost time.
_MOST_NESTED = 8
_LONGEST_NAME = 1000
_RESAVE = (
    "re-save only the weights, where you trust the file, with "
    'torch.save(model.state_dict(), "weights.pt") or safetensors'
)


@dataclass(frozen=True)
class Checkpoint:
    """The weights a file holds, ready for `loading.load_into`.

    Attributes:
        state: Entries by name, prefixes stripped, on the CPU. Floating types narrower than
            32 bits are widened to float32, all others are as in the file.
        path: The file.
        sha256: Hash of the file's bytes.
        container: Where in the file the state dict lay: ``""`` for a bare one, ``"state_dict"``,
            ``"model.state_dict"``, ...
        prefix: What was stripped from every name, such as ``"module._orig_mod."``.
        dtype: The floating type that holds most of the file's numbers.
        extras: Names of entries beside the weights that are not tensors and were left out.
    """

    state: dict[str, Tensor]
    path: Path
    sha256: str
    container: str
    prefix: str
    dtype: torch.dtype
    extras: tuple[str, ...] = ()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a state dict from safetensors or a torch file (``.pt``, ``.pth``, ``.th``, ``.bin``).

    The content decides the format, not the name. Torch files are read with ``weights_only=True``
    alone, so no code in them ever runs. The state dict may be bare or lie under one of
    `CONTAINERS`, nested too; the `PREFIXES` are stripped where all names carry them.

    Raises:
        CheckpointError: The file is missing, a folder, empty, truncated, a git-lfs pointer, of no
            known format, needs code to load, is an already compressed result, holds no tensors,
            or holds NaN or infinite values.
    """
    path = Path(path)
    content = _read(path)
    state, container = _find_state(content, path)
    extras = [_key_text(k) for k, v in state.items() if not isinstance(v, Tensor)]
    tensors = {_name(k, path): v.detach() for k, v in state.items() if isinstance(v, Tensor)}
    tensors, prefix, counters = _strip_prefixes(tensors)
    _check_usable(tensors, path)
    return Checkpoint(
        state={name: _widened(tensor) for name, tensor in tensors.items()},
        path=path,
        sha256=sha256_file(path),
        container=container,
        prefix=prefix,
        dtype=dtype_of(tensors.values()),
        extras=(*extras, *counters),
    )


# --- File formats ------------------------------------------------------------------------------


def _read(path: Path) -> Mapping[Any, Any]:
    """Return what the file holds, whatever its format."""
    try:
        if path.is_dir():
            inside = path / MODEL_FILE
            hint = f"pass {inside}" if inside.exists() else "pass the file in it"
            raise CheckpointError(f"The checkpoint {path} is a folder; {hint}.")
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
        with warnings.catch_warnings():
            # torch warns of an unusual pickle protocol and of TorchScript; both end in an error
            # here or load well, and the warning would only come before our own words.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|\bof type (\S+)|class (\S+) was not", str(error))
        if found is None and "Unsupported" not in str(error):
            raise _damaged(path, error) from error
        name = next((g for g in found.groups() if g), "") if found else ""
        raise CheckpointError(
            f"The checkpoint {path} needs code to load{f' ({name})' if name else ''} and is "
            "refused, because such a file can run anything; nothing in it was run. If it holds a "
            f"whole module or training arguments, {_RESAVE}."
        ) from error
    except _DAMAGE as error:
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"The checkpoint {path} is a TorchScript archive, which holds code; {_RESAVE}."
            ) from error
        raise _damaged(path, error) from error
    if isinstance(content, Tensor):
        raise CheckpointError(f"The checkpoint {path} holds one bare tensor, no names; {_RESAVE}.")
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"The checkpoint {path} holds a {type(content).__name__}, no state dict; {_RESAVE}."
        )
    return content


def _damaged(path: Path, error: BaseException) -> CheckpointError:
    text = " ".join(str(error).split()).partition(". ")[0].rstrip(".") or type(error).__name__
    return CheckpointError(
        f"The checkpoint {path} ({path.stat().st_size} bytes) is truncated or damaged: {text}; "
        "fetch or save it again."
    )


# --- From a file's content to a state dict -----------------------------------------------------


def _find_state(content: Mapping[Any, Any], path: Path) -> tuple[Mapping[Any, Any], str]:
    """Descend into containers as long as one holds tensors; return the state dict and its place."""
    place: list[str] = []
    state = content
    # A file may hold itself: it ends nowhere.
    while inner := next((c for c in CONTAINERS if _holds_tensors(state.get(c))), None):
        place.append(inner)
        state = state[inner]
        if len(place) > _MOST_NESTED:
            raise CheckpointError(
                f"The checkpoint {path} holds state dicts in each other, more than "
                f"{_MOST_NESTED} deep or without end; {_RESAVE}."
            )
    if any(isinstance(value, Tensor) for value in state.values()):
        return state, ".".join(place)
    keys = listed([_key_text(k) for k in state]) if state else "nothing"
    other = next((_key_text(k) for k, v in state.items() if _holds_tensors(v)), None)
    remedy = (
        f"if the weights are under {other!r}, re-save them with "
        f'torch.save(checkpoint["{other}"], "weights.pt")'
        if other
        else "pass a file that holds a model's state dict"
    )
    raise CheckpointError(
        f"The checkpoint {path} has no weights, bare or under {', '.join(CONTAINERS)}: it holds "
        f"{keys}; {remedy}."
    )


def _holds_tensors(value: object) -> bool:
    """Whether a state dict or a container in it holds tensors, down to `_MOST_NESTED`."""
    level = [value]
    seen: set[int] = set()
    for _ in range(_MOST_NESTED):
        dicts = [v for v in level if isinstance(v, Mapping) and id(v) not in seen]
        if any(isinstance(v, Tensor) for d in dicts for v in d.values()):
            return True
        seen.update(map(id, dicts))
        level = [d[c] for d in dicts for c in CONTAINERS if c in d]
    return False


def _name(key: object, path: Path) -> str:
    """Return the name of a tensor's entry.

    Raises:
        CheckpointError: It is no text, or longer than any network's.
    """
    text = _key_text(key)
    if not isinstance(key, str | int) or len(text) > _LONGEST_NAME:
        raise CheckpointError(
            f"The checkpoint {path} holds a tensor under {text[:60]!r}, which is no name of a "
            f"network's entry (text of up to {_LONGEST_NAME} characters); {_RESAVE}."
        )
    return text


def _key_text(key: object) -> str:
    """Return what an entry is called; a key that is neither text nor a number, by its type."""
    plain = isinstance(key, str) or (isinstance(key, int) and abs(key) < 1 << 63)
    return str(key) if plain else type(key).__name__


def _strip_prefixes(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """Strip wrappers' prefixes; return the rest, the prefix and averaging counters left out.

    ``n_averaged`` is the counter that ``torch.optim.swa_utils.AveragedModel`` keeps beside
    ``module.``; it is not a weight of the network.
    """
    counters = tuple(n for n in tensors if n == "n_averaged")
    names = [n for n in tensors if n not in counters]
    stripped = ""
    while names:
        prefix = next((p for p in PREFIXES if all(n.startswith(stripped + p) for n in names)), None)
        if prefix is None:
            break
        stripped += prefix
    if not stripped:
        return tensors, "", ()
    return {n[len(stripped) :]: tensors[n] for n in names}, stripped, counters


def _check_usable(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse what cannot be weights of a network, whatever network it is.

    Raises:
        CheckpointError: Entries are quantised, sparse, without values, not finite, of more axes
            than torch computes with, or repeat few numbers very often.
    """
    packed = [n for n, t in tensors.items() if t.is_quantized or t.layout != torch.strided]
    if packed:
        raise CheckpointError(
            f"The checkpoint {path} holds quantised or sparse entries: {listed(packed)}; pass "
            "the checkpoint from before quantisation."
        )
    empty = [n for n, t in tensors.items() if t.is_meta]
    if empty:
        raise CheckpointError(
            f"The checkpoint {path} holds names and shapes without values (saved on the meta "
            f"device): {listed(empty)}; save the weights after they are loaded."
        )
    many = [n for n, t in tensors.items() if t.ndim > MOST_AXES]
    if many:
        raise CheckpointError(
            f"The checkpoint {path} holds tensors of more than {MOST_AXES} axes: {listed(many)}; "
            f"{_RESAVE}."
        )
    try:
        check_expansion(path.stat().st_size, sum(t.numel() * t.itemsize for t in tensors.values()))
    except Unreadable as error:
        raise _damaged(path, error) from error
    broken = not_finite(tensors)
    if broken:
        raise CheckpointError(
            f"The checkpoint {path} holds NaN or infinite values in {listed(broken)}; training "
            "had diverged when it was saved: pass an earlier one."
        )


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


def listed(names: Sequence[str]) -> str:
    """Return the first 20 names and how many there are."""
    shown = ", ".join(names[:_SHOWN])
    if len(names) == 1:
        return shown
    return f"{shown}{', ...' if len(names) > _SHOWN else ''} ({len(names)} in all)"
