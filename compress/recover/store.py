"""The state of a course in a file, from which it goes on to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from compress.errors import ArtefactError
from compress.files import SEAL_KEY, BrokenSeal, check_tensors, sealed_tensors, write_atomically
from compress.recover.course import State
from compress.result.encoding import plain_data
from compress.untrusted import Unreadable, parse_json, read_record
from compress.untrusted.tensors import read_tensors

_STATE, _KEY = "compress_recovery", "compress_recovery_key"


@dataclass(frozen=True)
class Stored:
    """A course as it was written.

    Attributes:
        state: Where it stands.
        tensors: Its weights and the averages that steps are taken by.
    """

    state: State
    tensors: Mapping[str, Tensor]


def write_state(
    path: Path, state: State, tensors: Mapping[str, Tensor], key: Mapping[str, Any]
) -> None:
    """Write a course, atomically.

    Args:
        path: The file.
        state: Where it stands.
        tensors: What `Course.tensors` gives.
        key: What it belongs to; only a course of the same goes on from it.

    Raises:
        ArtefactError: The file cannot be written; what stood there before still stands.
    """
    # A distance that is not finite, which JSON does not have, is read back as one that is unknown.
    numbers = json.dumps(plain_data(asdict(state)), allow_nan=False)
    metadata = {_STATE: numbers, _KEY: json.dumps(key, sort_keys=True)}
    # Copies, since tied weights may share their storage, which safetensors refuses.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = safetensors.torch.save(own)
    write_atomically(path, sealed_tensors(content, metadata))


def read_state(path: Path, key: Mapping[str, Any]) -> Stored:
    """Read a course.

    Raises:
        ArtefactError: There is none, it is damaged, or belongs to something else.
    """
    try:
        if not path.is_file():
            raise ArtefactError(
                f"There is nothing to go on from: {path} does not exist. Leave out --resume."
            )
        check_tensors(path)
        found = read_tensors(path)
        metadata = found.metadata
        if SEAL_KEY not in metadata:
            raise ArtefactError(f"{path} is no state of a recovery; leave out --resume.")
        belongs = parse_json(metadata[_KEY])
        state = read_record(State, parse_json(metadata[_STATE]), "the state")
    except (OSError, Unreadable, BrokenSeal, KeyError) as error:
        raise ArtefactError(
            f"{path} is damaged ({error}); leave out --resume to begin anew."
        ) from error
    other = [name for name in key if belongs.get(name) != json.loads(json.dumps(key[name]))]
    if other:
        raise ArtefactError(
            f"What {path} holds belongs to another recovery: it differs in {', '.join(other)}. "
            "Repeat the same command with --resume, or leave --resume out to begin anew."
        )
    return Stored(state, found.tensors)
