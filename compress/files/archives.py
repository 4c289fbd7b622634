"""Zip archives, whose members carry checksums that their readers do not all check."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

# What nothing but a trap or damage compresses to: torch stores its members as they are.
_ABSURD_RATIO = 100
_PIECE = 1 << 20

# What Python's reader raises of an archive that is damaged, or of a kind that it does not know.
ARCHIVE_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


def check_archive(path: str | Path, *, expands: bool = True) -> None:
    """Read every member of a zip archive, a piece at a time, and compare its checksum.

    torch compares none of them, and numpy none of a member that it does not read to its end. An
    archive whose checksums are all zero was written without any (as torch does after
    ``set_crc32_options(False)``), and passes.

    Args:
        path: The archive.
        expands: Whether members may be a hundred times as large as what is stored of them.

    Raises:
        zipfile.BadZipFile: A member is not what was written, or expands absurdly.
        OSError: The archive cannot be read.
        Exception: Others of `ARCHIVE_DAMAGE`.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members if not expands else ():
            if member.file_size > _ABSURD_RATIO * max(member.compress_size, 1):
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
