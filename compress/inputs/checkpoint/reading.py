"""Reading checkpoints as users have them: in one file or several, wrapped or bare."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.errors import CheckpointError
from compress.inputs.checkpoint.formats import (
    ARTEFACT_KEY,
    RESAVE,
    damaged,
    listed,
    read_content,
)
from compress.inputs.checkpoint.shards import (
    files_of,
    is_index,
    read_sharded,
    resolved,
    sha256_of,
)
from compress.inputs.checkpoint.states import (
    CONTAINERS,
    PREFIXES,
    Pick,
    entry_name,
    find_state,
    key_text,
    state_places,
    strip_prefixes,
    take_prefix,
)
from compress.running.finite import not_finite
from compress.running.modules import dtype_of
from compress.untrusted import Unreadable, check_expansion
from compress.untrusted.tensors import MOST_AXES

__all__ = [
    "ARTEFACT_KEY",
    "CONTAINERS",
    "PREFIXES",
    "Checkpoint",
    "Pick",
    "checkpoint_sha256",
    "files_of",
    "listed",
    "read_checkpoint",
    "weights_of",
]


@dataclass(frozen=True)
class Checkpoint:
    """The weights a file holds, ready for `loading.load_into`.

    Attributes:
        state: Entries by name, prefixes stripped, on the CPU. Floating types narrower than
            32 bits are widened to float32, all others are as in the file.
        path: The file.
        sha256: As `checkpoint_sha256`.
        container: Where in the file the state dict lay: ``""`` for a bare one, ``"state_dict"``,
            ``"model.state_dict"``, ...
        prefix: What was stripped from every name, such as ``"module._orig_mod."``.
        dtype: The floating type that holds most of the file's numbers.
        extras: Names of entries beside the weights that are not tensors and were left out.
        others: Where further state dicts lie in the file.
    """

    state: dict[str, Tensor]
    path: Path
    sha256: str
    container: str
    prefix: str
    dtype: torch.dtype
    extras: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def read_checkpoint(path: str | Path, pick: Pick | None = None) -> Checkpoint:
    """Read a state dict from safetensors or torch files (``.pt``, ``.pth``, ``.th``, ``.bin``).

    The content decides the format, not the name; only an index of several files is told by its
    name, ``*.json``. Torch files are read with ``weights_only=True`` alone, so no code in them
    ever runs. The state dict may be bare or lie under one of `CONTAINERS`, nested too; the
    `PREFIXES` are stripped where all names carry them.

    Args:
        path: The file, the index of several, or a folder with either.
        pick: Which of its entries are the weights.

    Raises:
        CheckpointError: The file is missing, empty, truncated, a git-lfs pointer, of no known
            format, needs code to load, is an already compressed result, holds no tensors or none
            that were picked, or holds NaN or infinite values.
    """
    pick = pick or Pick()
    path = resolved(Path(path))
    content = read_sharded(path) if is_index(path) else read_content(path)
    state, container = find_state(content, path, pick.key)
    extras = [key_text(k) for k, v in state.items() if not isinstance(v, Tensor)]
    tensors = {entry_name(k, path): v.detach() for k, v in state.items() if isinstance(v, Tensor)}
    if pick.prefix:
        tensors = take_prefix(tensors, pick.prefix, path)
    tensors, prefix, counters = strip_prefixes(tensors)
    _check_usable(tensors, path, sum(f.stat().st_size for f in files_of(path)))
    return Checkpoint(
        state={name: _widened(tensor) for name, tensor in tensors.items()},
        path=path,
        sha256=checkpoint_sha256(path, pick),
        container=container,
        prefix=prefix,
        dtype=dtype_of(tensors.values()),
        extras=(*extras, *counters),
        others=tuple(p for p in state_places(content) if p != container),
    )


def weights_of(model: nn.Module, files: tuple[Path, ...], dtype: torch.dtype) -> Checkpoint:
    """Return the weights that a network was built with, as those of a checkpoint.

    Args:
        model: The network.
        files: Where they came from, the main file first.
        dtype: The floating type that most of them had there.

    Raises:
        CheckpointError: They hold NaN or infinite values, or are of an unusable kind.
    """
    entries = model.state_dict()
    tensors = {name: t.detach().clone() for name, t in entries.items() if isinstance(t, Tensor)}
    _check_usable(tensors, files[0], sum(f.stat().st_size for f in files))
    return Checkpoint(tensors, files[0], sha256_of(files), "", "", dtype)


def checkpoint_sha256(path: str | Path, pick: Pick | None = None) -> str:
    """Hash of the bytes of a checkpoint's file, or of all its files with their names.

    Where the user picks among the entries, what was picked is part of it: other entries of one
    file are other weights.

    Raises:
        OSError: A file cannot be read.
        CheckpointError: The folder or the index cannot be used.
    """
    found = sha256_of(files_of(Path(path)))
    if not pick:
        return found
    return hashlib.sha256(f"{found}\0{pick.key}\0{pick.prefix}".encode()).hexdigest()


def _check_usable(tensors: Mapping[str, Tensor], path: Path, size: int) -> None:
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
            f"{RESAVE}."
        )
    try:
        check_expansion(size, sum(t.numel() * t.itemsize for t in tensors.values()))
    except Unreadable as error:
        raise damaged(path, error) from error
    broken = not_finite(tensors)
    if broken:
        raise CheckpointError(
            f"The checkpoint {path} holds NaN or infinite values in {listed(broken)}. "
            "Training may have diverged when it was saved: pass an earlier one. If the network "
            "never reads these values, set them to zero."
        )


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
