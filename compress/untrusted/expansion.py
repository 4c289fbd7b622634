"""Files that grow when they are read: archives, gzip, and tensors that repeat few numbers."""

from __future__ import annotations

import gzip
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from compress.untrusted.text import MEBIBYTE, Unreadable

# Content of up to this size is read however small the file is ...
FREE_BYTES = 128 * MEBIBYTE
# ... and beyond it up to this multiple of the file. Black images as npz come to some hundred.
LARGEST_FACTOR = 200

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 1

# What zipfile raises of an archive that is none, depending on the byte that is wrong.
_DAMAGE = (
    zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, LookupError, EOFError,
    OverflowError, struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Member:
    """One file in an archive, and the bytes that it says it has."""

    name: str
    size: int


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
def open_archive(path: str | Path) -> Iterator[tuple[zipfile.ZipFile, list[Member]]]:
    """Open a zip archive once it is sure that reading its members takes what they announce.

    Yields:
        The archive and its members.

    Raises:
        OSError: The file cannot be opened.
        Unreadable: It is no such archive; members overlap, share a name, are encrypted or packed
            by another method than deflate; they are out of proportion to the file; or, in the
            block, a member turns out to be damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive, _members(archive.infolist(), os.stat(path).st_size)
    except Unreadable:
        raise
    except _DAMAGE as error:
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from error


def _members(infos: list[zipfile.ZipInfo], size: int) -> list[Member]:
    names: set[str] = set()
    for info in infos:
        # One reader takes the first of a name and the other the last; some ignore its case.
        if info.filename.lower() in names:
            raise Unreadable(f"the archive holds {info.filename[:100]!r} twice")
        names.add(info.filename.lower())
        if info.compress_type not in _METHODS or info.flag_bits & _ENCRYPTED:
            raise Unreadable(f"{info.filename[:100]!r} is packed in a way that is not read here")
    if sum(info.compress_size for info in infos) > size:
        raise Unreadable("the archive's members overlap, or it is truncated")
    check_expansion(size, sum(info.file_size for info in infos))
    return [Member(info.filename, info.file_size) for info in infos]


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
