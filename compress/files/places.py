"""Whether something can be written at a place, found out before the work whose result it is."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from compress.errors import ArtefactError, printable
from compress.files.leftovers import DECORATION, claimed

# The longest names that common systems take, in bytes: of a file, and of its whole path.
LONGEST_NAME = 255
LONGEST_PATH = 4095
# The longest name of a file in a folder that this package writes: that of a sweep's point.
_INSIDE = 100
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_name(target: Path) -> None:
    """Refuse a path that could not be written, or not under a hidden name first.

    Args:
        target: An absolute path.

    Raises:
        ArtefactError: One of its names, or all of it, is too long.
    """
    names = [os.fsencode(part) for part in target.parts]
    for name, longest in [*((n, LONGEST_NAME) for n in names), (names[-1], _LONGEST_TARGET)]:
        if len(name) > longest:
            raise ArtefactError(
                f"The output's name {printable(os.fsdecode(name[:40]))}… has {len(name)} bytes, "
                f"and the file system takes names of at most {longest}; pass a shorter one."
            )
    length, longest = len(os.fsencode(target)), LONGEST_PATH - 2 * DECORATION - _INSIDE
    if length > longest:
        raise ArtefactError(
            f"The output's path {printable(target)[:40]}… has {length} bytes, and at most {longest}"
            " can be written; pass a shorter one."
        )


_LONGEST_TARGET = LONGEST_NAME - DECORATION


def check_writable(target: str | Path) -> None:
    """Find out whether a file or folder can be written, by a hidden file that is taken away.

    Args:
        target: The file or folder. Parents that are not there would be made, so the nearest that
            is there is tried.

    Raises:
        ArtefactError: It cannot, and why.
    """
    target = Path(target).absolute()
    check_name(target)
    try:
        with claimed(_first_to_make(target), new_file):
            pass
    except OSError as error:
        raise cannot_write(target, error) from error


def check_file(target: str | Path, what: str) -> None:
    """Find out whether a file can be written.

    Args:
        target: The file. Its folder must be there.
        what: What it is, for messages: ``"calibration"``.

    Raises:
        ArtefactError: It cannot, and why.
    """
    path = Path(target).absolute()
    check_name(path)
    if os.path.isdir(path):
        raise ArtefactError(f"The {what} {printable(path)} is a folder; pass a file.")
    if not os.path.isdir(path.parent):
        raise ArtefactError(
            f"The {what} {printable(path)} cannot be written: there is no folder "
            f"{printable(path.parent)}; make it, or pass another file."
        )
    check_writable(path)


def check_room(target: str | Path, least: int) -> None:
    """Refuse a target on a disk that certainly has no room for it.

    Args:
        target: The file or folder to be written.
        least: Bytes that it takes at least.

    Raises:
        ArtefactError: The disk has fewer free.
    """
    target = Path(target).absolute()
    free = shutil.disk_usage(_first_to_make(target).parent).free
    if free < least:
        raise ArtefactError(
            f"{printable(target)} cannot be written: it takes at least {least:,} bytes, and its "
            f"disk has {free:,} free; free some space or pass an output on another disk."
        )


def new_file(path: Path) -> None:
    """Make an empty file that is not there yet."""
    open(path, "xb").close()


def cannot_write(path: Path, error: BaseException) -> ArtefactError:
    """Return the error that says why a path cannot be written, and what to do."""
    number = error.errno if isinstance(error, OSError) else errno.ENOSPC
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    remedy = (
        "free some space or pass an output on another disk"
        if number in FULL
        else "check that its parent exists and that you may write there"
    )
    return ArtefactError(
        f"{printable(path)} cannot be written: {reason}; {remedy}. Nothing was left there."
    )


def _first_to_make(target: Path) -> Path:
    """The target, or its highest parent that is not there."""
    while not os.path.exists(target.parent):
        target = target.parent
    return target
