"""What an npz file says it holds, compared with what is there before numpy takes memory for it."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from compress.untrusted import Unreadable, open_archive

# The longest header that a plain array has; numpy evaluates it as a literal of Python.
_LONGEST_HEADER = 4096
_MOST_BRACKETS = 16


def check_npz(path: Path) -> None:
    """Refuse an npz file whose arrays announce more than the archive holds.

    Raises:
        OSError: It cannot be read.
        Unreadable: The reason, without a full stop.
    """
    with open_archive(path) as (archive, members):
        for member in members:
            if member.name.endswith(".npy"):
                with archive.open(member.name) as opened:
                    _check_array(member.name[:60], opened, member.size)


def _check_array(name: str, file: IO[bytes], size: int) -> None:
    start = file.read(12)
    if start[:6] != b"\x93NUMPY":
        raise Unreadable(f"{name!r} is no array of numpy")
    wide = start[6] > 1
    length = int.from_bytes(start[8 : 12 if wide else 10], "little")
    text = (b"" if wide else start[10:]) + file.read(length if wide else max(length - 2, 0))
    if length > _LONGEST_HEADER or sum(text.count(mark) for mark in b"([{") > _MOST_BRACKETS:
        raise Unreadable(f"the array {name!r} has the header of no plain array")
    shape, dtype = _announced(name, start, text)
    if dtype.hasobject:
        return  # which numpy refuses without reading on
    expected = math.prod(shape) * dtype.itemsize
    held = size - length - (12 if wide else 10)
    if expected != held:
        raise Unreadable(
            f"the array {name!r} announces {str(list(shape))[:60]} of {dtype}, {expected} bytes, "
            f"and holds {held}"
        )


def _announced(name: str, start: bytes, text: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    header = io.BytesIO(start + text if start[6] > 1 else start[:10] + text)
    try:
        version = npy.read_magic(header)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(header, max_header_size=_LONGEST_HEADER)
    except (ValueError, TypeError, SyntaxError, LookupError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise Unreadable(f"the header of the array {name!r} is damaged: {reason}") from error
    if any(not 0 <= count < 1 << 63 for count in shape):
        raise Unreadable(f"the array {name!r} announces the shape {str(list(shape))[:60]}")
    return shape, dtype
