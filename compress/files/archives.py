"""Zip archives, whose members carry checksums that their readers do not all check."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path

# What nothing but a trap or damage compresses to: torch stores its members as they are.
_ABSURD_RATIO = 100
_PIECE = 1 << 20
# The record at the end, with the longest comment; and its number for more than it can count.
_LONGEST_END, _MANY = 22 + 0xFFFF, 0xFFFF

_KNOWN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

# What Python's reader raises of damage, depending on the byte, and of members with a password.
_DAMAGE = (zlib.error, struct.error, EOFError, ValueError, NotImplementedError, RuntimeError)


def check_archive(path: str | Path, *, expands: bool = True) -> None:
    """Read every member of a zip archive, a piece at a time, and compare its checksum.

    torch compares none of them, and numpy none of a member that it does not read to its end. An
    archive whose checksums are all zero was written without any (as torch does after
    ``set_crc32_options(False)``), and passes.

    Args:
        path: The archive.
        expands: Whether members may be a hundred times as large as what is stored of them.

    Raises:
        zipfile.BadZipFile: A member is not what was written, expands absurdly, or is packed in a
            way that neither torch nor numpy knows.
        OSError: The archive cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found, announced = len(archive.infolist()), _announced(Path(path))
            if announced not in (found, _MANY):
                raise zipfile.BadZipFile(f"it lists {found} members and announces {announced}")
            _check_members(archive, expands=expands)
    except _DAMAGE as error:
        raise zipfile.BadZipFile(str(error)) from error


def _announced(path: Path) -> int:
    """The number of members that the end of an archive tells, which Python does not look at."""
    with open(path, "rb") as file:
        file.seek(-min(_LONGEST_END, path.stat().st_size), 2)
        end = file.read()
    at = end.rfind(b"PK\x05\x06") + 10
    return int.from_bytes(end[at : at + 2], "little")


def _check_members(archive: zipfile.ZipFile, *, expands: bool) -> None:
    members = archive.infolist()
    for member in members:
        if member.compress_type not in _KNOWN:
            raise zipfile.BadZipFile(f"member {member.filename!r} is packed in an unknown way")
        if not expands and member.file_size > _ABSURD_RATIO * max(member.compress_size, 1):
            raise zipfile.BadZipFile(
                f"member {member.filename!r} announces {member.file_size} bytes in "
                f"{member.compress_size}, which no weights compress to"
            )
    if not any(member.CRC for member in members):
        return
    for member in members:
        with archive.open(member) as opened:
            while opened.read(_PIECE):
                pass  # the checksum is compared at the end
