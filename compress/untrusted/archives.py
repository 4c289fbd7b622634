"""Zip archives, whose members carry checksums that their readers do not all check.

torch compares none of them, and numpy none of a member that it does not read to its end. Neither
looks at the number of members that the archive announces.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from compress.untrusted.expansion import check_expansion
from compress.untrusted.text import Unreadable

# What nothing but a trap or damage compresses to, where members are stored as they are.
_ABSURD_RATIO = 100
_PIECE = 1 << 20
# The record at the end, with the longest comment; and its number for more than it can count.
_LONGEST_END, _MANY = 22 + 0xFFFF, 0xFFFF
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


@contextmanager
def open_archive(
    path: str | Path, *, expands: bool = True
) -> Iterator[tuple[zipfile.ZipFile, list[Member]]]:
    """Open a zip archive once it is sure that its members are what was written.

    Every member is read once, a piece at a time, and its checksum compared. An archive whose
    checksums are all zero was written without any (as torch does after
    ``set_crc32_options(False)``), and passes.

    Args:
        path: The archive.
        expands: Whether members may be a hundred times as large as what is stored of them.

    Yields:
        The archive and its members.

    Raises:
        OSError: The file cannot be opened.
        Unreadable: It is no such archive; members are missing, damaged, overlap, share a name, are
            encrypted or packed by another method than deflate; or they are out of proportion to
            the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            _check_number(len(infos), Path(path))
            _check_names(infos)
            _check_sizes(infos, os.stat(path).st_size, expands=expands)
            _check_content(archive)
            yield archive, [Member(info.filename, info.file_size) for info in infos]
    except Unreadable:
        raise
    except _DAMAGE as error:
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from error


def _check_number(found: int, path: Path) -> None:
    """Compare with the number of members that the archive's end tells, as Python does not."""
    with open(path, "rb") as file:
        file.seek(-min(_LONGEST_END, path.stat().st_size), 2)
        end = file.read()
    at = end.rfind(b"PK\x05\x06") + 10
    announced = int.from_bytes(end[at : at + 2], "little")
    if announced not in (found, _MANY):
        raise Unreadable(f"it lists {found} members and announces {announced}")


def _check_names(infos: list[zipfile.ZipInfo]) -> None:
    names: set[str] = set()
    for info in infos:
        # One reader takes the first of a name and the other the last; some ignore its case.
        if info.filename.lower() in names:
            raise Unreadable(f"the archive holds {info.filename[:100]!r} twice")
        names.add(info.filename.lower())
        if info.compress_type not in _METHODS or info.flag_bits & _ENCRYPTED:
            raise Unreadable(f"{info.filename[:100]!r} is packed in a way that is not read here")


def _check_sizes(infos: list[zipfile.ZipInfo], size: int, *, expands: bool) -> None:
    if sum(info.compress_size for info in infos) > size:
        raise Unreadable("the archive's members overlap, or it is truncated")
    check_expansion(size, sum(info.file_size for info in infos))
    for info in infos:
        if not expands and info.file_size > _ABSURD_RATIO * max(info.compress_size, 1):
            raise Unreadable(
                f"member {info.filename[:100]!r} announces {info.file_size} bytes in "
                f"{info.compress_size}, which no weights compress to"
            )


def _check_content(archive: zipfile.ZipFile) -> None:
    infos = archive.infolist()
    if not any(info.CRC for info in infos):
        for info in infos:
            del info.CRC  # so that zipfile does not compare it
        return
    for info in infos:
        with archive.open(info) as opened:
            while opened.read(_PIECE):
                pass  # the checksum is compared at the end
