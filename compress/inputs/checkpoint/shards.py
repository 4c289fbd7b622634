"""Checkpoints in several files: a folder, or the index that says which file holds which entry."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.errors import CheckpointError
from compress.files import MODEL_FILE, sha256_file
from compress.inputs.checkpoint.formats import listed, read_content
from compress.untrusted import Unreadable, read_json

# In a folder, the first of these that is there is the checkpoint.
FILES = (
    MODEL_FILE,
    f"{MODEL_FILE}.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def resolved(path: Path) -> Path:
    """Return the file that a path stands for: in a folder, the weights or their index.

    Raises:
        CheckpointError: The folder holds neither.
    """
    if not path.is_dir():
        return path
    inside = next((path / name for name in FILES if (path / name).is_file()), None)
    if inside is None:
        raise CheckpointError(
            f"The checkpoint {path} is a folder; pass the file in it, since it holds none of "
            f"{', '.join(FILES)}."
        )
    return inside


def is_index(path: Path) -> bool:
    """Whether a file is an index, by its name: nothing else is called so."""
    return path.suffix == ".json"


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the files that a checkpoint consists of, the index first.

    Raises:
        CheckpointError: The index is damaged, or one of its files is not there.
    """
    path = resolved(path)
    if not is_index(path):
        return (path,)
    return (path, *(path.parent / name for name in sorted(set(_weight_map(path).values()))))


def sha256_of(files: tuple[Path, ...]) -> str:
    """Hash of the content of one file, or of several with their names.

    Raises:
        OSError: One cannot be read.
    """
    if len(files) == 1:
        return sha256_file(files[0])
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{sha256_file(file)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def read_sharded(index: Path) -> dict[str, Tensor]:
    """Read all files that an index names.

    Raises:
        CheckpointError: The index or a file is missing or damaged, or they disagree on which entry
            lies where.
    """
    places = _weight_map(index)
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        shard = index.parent / name
        held = read_content(shard)
        wanted = [entry for entry, place in places.items() if place == name]
        _check_entries(index, name, held, wanted)
        state.update((entry, held[entry]) for entry in wanted)
    return {entry: state[entry] for entry in places}


def _check_entries(index: Path, name: str, held: Mapping[Any, Any], wanted: list[str]) -> None:
    missing = [entry for entry in wanted if not isinstance(held.get(entry), Tensor)]
    known = set(wanted)
    unknown = [str(entry) for entry in held if entry not in known]
    if missing:
        raise CheckpointError(
            f"The index {index} says that {name} holds {listed(missing)}, and it does not; fetch "
            "both again."
        )
    if unknown:
        raise CheckpointError(
            f"The file {name} holds {listed(unknown)}, which the index {index} has elsewhere or "
            "not at all; fetch both again."
        )


def _weight_map(index: Path) -> dict[str, str]:
    """Read which file holds which entry.

    Raises:
        CheckpointError: The index is damaged, leads out of its folder, or names a file that is not
            there.
    """
    try:
        raw = read_json(index)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {index} cannot be read: {error.strerror}; check the path."
        ) from error
    except Unreadable as error:
        raise CheckpointError(f"The index {index} is damaged: {error}; fetch it again.") from error
    places = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(
            f"The checkpoint {index} is no index of weights: it has no weight_map. Pass the "
            "weights, or the model.safetensors.index.json beside them."
        )
    for entry, name in places.items():
        if not isinstance(name, str) or not _is_beside(name):
            raise CheckpointError(
                f"The index {index} places {entry[:60]!r} in {str(name)[:100]!r}, which is not "
                "the name of a file beside it; nothing elsewhere is read."
            )
    missing = sorted(n for n in set(places.values()) if not (index.parent / n).is_file())
    if missing:
        raise CheckpointError(
            f"The index {index} names {listed(missing)}, which is not beside it; fetch all files "
            "of the checkpoint."
        )
    return places


def _is_beside(name: str) -> bool:
    """Whether a name is that of a file in the same folder, on any system."""
    plain = name not in ("", ".", "..") and set(name).isdisjoint("/\\:\0")
    return plain and len(name) <= 255 and not is_index(Path(name))
