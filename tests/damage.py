"""Files with one bit turned over, as a disk or a copy leaves them now and then."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open

from compress.files import sealed_tensors, write_atomically


def flipped(file: Path, count: int, start: int = 0, stop: int | None = None) -> Iterator[int]:
    """Turn over one bit after another, each alone, between two bytes; then put the file back.

    Yields:
        The byte in which the bit lies.
    """
    whole = file.read_bytes()
    stop = len(whole) if stop is None else stop
    draw = random.Random(0)
    for bit in draw.sample(range(8 * start, 8 * stop), min(count, 8 * (stop - start))):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(damaged)
        yield bit // 8
    file.write_bytes(whole)


def body_of(file: Path) -> int:
    """Where the tensors of a safetensors file begin."""
    with open(file, "rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


def resealed(file: Path, key: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the JSON under a key of the header and seal it again, as only a program could."""
    tensors = safetensors.torch.load_file(file)
    record = json.loads(metadata_of(file)[key])
    change(record)
    write_sealed(file, tensors, {key: json.dumps(record)})


def write_sealed(file: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    content = safetensors.torch.save(dict(tensors))
    write_atomically(file, sealed_tensors(content, metadata))
