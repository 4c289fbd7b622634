"""Content that grows when it is read: gzip, archives, and tensors that repeat few numbers."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from compress.untrusted.text import MEBIBYTE, Unreadable

# Content of up to this size is read however small the file is ...
FREE_BYTES = 128 * MEBIBYTE
# ... and beyond it up to this multiple of the file. Black images as npz come to some hundred.
LARGEST_FACTOR = 200


def check_expansion(small: int, large: int) -> None:
    """Refuse content that is out of proportion to the file that it comes from.

    Args:
        small: Bytes of the file.
        large: Bytes of what it becomes.

    Raises:
        Unreadable: It takes more than `FREE_BYTES` and `LARGEST_FACTOR` times the file.
    """
    if large > max(FREE_BYTES, LARGEST_FACTOR * small):
        raise Unreadable(
            f"its {small:,} bytes become {large:,}, more than {LARGEST_FACTOR} times as many, as "
            "in a file that is made to fill the memory; if it is genuine, save it without "
            "compression or repetition"
        )


@contextmanager
def open_gzip(path: str | Path) -> Iterator[gzip.GzipFile | BufferedReader]:
    """Open a file that may be gzipped, for reading what it holds in pieces.

    Yields:
        The content; read no more of it than `check_expansion` allows.

    Raises:
        OSError: The file cannot be opened.
        Unreadable: While it is read: it is truncated or damaged.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            if packed:
                with gzip.open(file) as inner:
                    yield inner
            else:
                yield file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise Unreadable(" ".join(str(error).split())) from error
