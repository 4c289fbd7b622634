"""Digests that tell whether a file is still what was written.

Neither safetensors nor JSON has a checksum: a bit that a disk or a copy turned over gives other
numbers and no error. What this package writes to read it again carries a SHA-256 of everything
else in the file: of a safetensors file in its metadata, of JSON in a field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.untrusted import decode, parse_json

SEAL_KEY = "compress_sha256"  # in the safetensors header
_FIELD = "sha256"  # in JSON
_METADATA = "__metadata__"  # where safetensors has its metadata in the header
_LENGTH = 8  # bytes before the header, which say how long that is


class BrokenSeal(ValueError):  # noqa: N818 - names what is wrong, in the words of this module
    """A file that is not what was written, or carries no digest.

    The message follows the name of the file: "was damaged or edited ...".
    """


_BROKEN = "was damaged or edited since it was written: its digest does not fit"
_NONE = "carries no digest of its content, so that nobody can tell whether it was damaged"


def sealed_tensors(content: bytes, metadata: Mapping[str, str]) -> tuple[bytes, memoryview]:
    """Give a safetensors file metadata and a digest of everything in it.

    The header is written here, because safetensors writes several entries of metadata in an order
    that changes from process to process.

    Args:
        content: The file as ``safetensors.torch.save`` gives it, without metadata.
        metadata: What its header is to say.

    Returns:
        The parts of the file in their order. The tensors are not copied.
    """
    size = int.from_bytes(content[:_LENGTH], "little")
    body = memoryview(content)[_LENGTH + size :]
    table = json.loads(content[_LENGTH : _LENGTH + size])
    digest = _started({_METADATA: dict(metadata), **table})
    digest.update(body)
    sealed = {_METADATA: {**metadata, SEAL_KEY: digest.hexdigest()}, **table}
    header = json.dumps(sealed, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _LENGTH)  # tensors begin at a multiple of eight
    return len(header).to_bytes(_LENGTH, "little") + header, body


def check_tensors(path: str | Path) -> None:
    """Check that a safetensors file is what `sealed_tensors` made, in one pass over it.

    Raises:
        BrokenSeal: It is not, or carries no digest.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(_LENGTH), "little")
        if size > Path(path).stat().st_size:
            raise BrokenSeal(_BROKEN)
        try:
            header = parse_json(decode(file.read(size)))
            metadata = dict(header[_METADATA])
        except (ValueError, KeyError, TypeError) as error:
            raise BrokenSeal(_BROKEN) from error
        carried = metadata.pop(SEAL_KEY, None)
        if carried is None:
            raise BrokenSeal(_NONE)
        started = _started({**header, _METADATA: metadata})
        found = hashlib.file_digest(file, lambda: started)
    if found.hexdigest() != carried:
        raise BrokenSeal(_BROKEN)


def sealed_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain data, ready for JSON, with a digest of all of it in the field ``sha256``."""
    plain: dict[str, Any] = json.loads(_canonical(record))
    return {**plain, _FIELD: _started(plain).hexdigest()}


def unsealed_record(raw: Any) -> dict[str, Any]:
    """Return what `sealed_record` was given, read back from JSON.

    Raises:
        BrokenSeal: It is something else, was edited, or carries no digest.
    """
    if not isinstance(raw, dict):
        raise BrokenSeal(_BROKEN)
    if _FIELD not in raw:
        raise BrokenSeal(_NONE)
    record = {key: value for key, value in raw.items() if key != _FIELD}
    if _started(record).hexdigest() != raw[_FIELD]:
        raise BrokenSeal(_BROKEN)
    return record


def _started(record: Mapping[str, Any]) -> hashlib._Hash:
    """A digest of plain data, to which more can be added."""
    return hashlib.sha256(_canonical(record).encode())


def _canonical(record: Mapping[str, Any]) -> str:
    """Plain data as text that does not depend on the order of its keys."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), default=str)
