"""What a process that was killed while it wrote has left behind, and who may clear it.

Everything is written under a hidden name beside its target, ``.<target>.<8 hex digits>.partial``,
and locked while it is written. The system releases a lock when its process ends, however it ends,
so a hidden name that can be locked belongs to nobody any more. A replaced folder may be called
``.<target>.<8 hex digits>.old`` for the moment between two renames, where the file system cannot
exchange names in one step.
"""

from __future__ import annotations

import importlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from compress.files.undisturbed import undisturbed

# Windows has no such locks: nothing is cleared there, and nothing is lost.
_fcntl: ModuleType | None = importlib.import_module("fcntl") if os.name == "posix" else None

PARTIAL, OLD = "partial", "old"
_HIDDEN = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{8}\.(?P<what>partial|old)", re.DOTALL)
# What `hidden` adds to a name, in bytes.
DECORATION = len("..12345678.partial")


def hidden(path: Path, what: str = PARTIAL) -> Path:
    """Return a new hidden name beside ``path``, for what is not finished or no longer current."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{what}")


def target_of(name: str) -> str | None:
    """Return the name that a hidden name was made for, or None for any other name."""
    match = _HIDDEN.fullmatch(name)
    return match["target"] if match else None


@contextmanager
def claimed(target: Path, create: Callable[[Path], object]) -> Iterator[Path]:
    """Create a hidden file or folder beside ``target`` and hold its lock while the block runs.

    Whatever has that name when the block ends is deleted.

    Args:
        target: What it is to become.
        create: Makes it, at the path it is called with.

    Raises:
        OSError: It cannot be made.
    """
    made: list[tuple[Path, int]] = []
    try:
        with undisturbed():
            made.append(_create(target, create))
        yield made[0][0]
    finally:
        with undisturbed():
            for path, descriptor in made:
                os.close(descriptor)
                with suppress(OSError):
                    remove(path)


def _create(target: Path, create: Callable[[Path], object]) -> tuple[Path, int]:
    while True:
        path = hidden(target)
        create(path)
        with suppress(FileNotFoundError):  # cleared before it was locked: another one, then
            descriptor = os.open(path, os.O_RDONLY)
            if _claim(descriptor, path):
                return path, descriptor
            os.close(descriptor)


def _claim(descriptor: int, path: Path) -> bool:
    """Lock what was just made; False where somebody who clears up was quicker."""
    if _fcntl is None:
        return True
    try:
        _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks, where nobody clears up either
    return path.exists()


def clear_leftovers(target: Path) -> None:
    """Clear what killed processes left beside ``target``, and bring back what they had put aside.

    What another process is writing at this moment is not touched.

    Args:
        target: A file or folder, which need not exist. Only hidden names made for it are looked at.
    """
    for leftover in _leftovers(target.parent, target.name):
        with suppress(OSError):  # it may vanish meanwhile, or be another user's
            with _abandoned(leftover) as nobodys:
                if not nobodys:
                    continue
                if leftover.name.endswith(f".{OLD}") and not target.exists():
                    # Killed between the two renames: the earlier result has only this name.
                    leftover.rename(target)
                else:
                    remove(leftover)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all it holds; nothing happens if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _leftovers(folder: Path, name: str) -> list[Path]:
    try:
        entries = list(folder.iterdir())
    except OSError:
        return []
    return sorted(entry for entry in entries if target_of(entry.name) == name)


@contextmanager
def _abandoned(path: Path) -> Iterator[bool]:
    """Whether no process holds a hidden name; it is held here while the block runs."""
    if path.is_symlink():
        yield False  # none of ours
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a descriptor and say whether that went; some network file systems know no locks."""
    if _fcntl is None:
        return False
    try:
        _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except OSError:
        return False
    return True
