"""Finding the pictures below a folder: links are followed, and nothing is read twice or opened."""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from compress.errors import DataError, near_matches, printable
from compress.vision.pictures import IMAGE_SUFFIXES

_LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@dataclass(frozen=True)
class Found:
    """One entry of a folder, links followed.

    Attributes:
        name: As the file system has it; bytes that are no UTF-8 stand as lone surrogates.
        path: Where it is.
        status: What it is, or what a link leads to.
        linked: Whether it is a link.
    """

    name: str
    path: str
    status: os.stat_result
    linked: bool

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, or a link to one."""
        return stat.S_ISDIR(self.status.st_mode)

    @property
    def is_picture(self) -> bool:
        """Whether it is a regular file named as a picture; a pipe or a device never is."""
        return stat.S_ISREG(self.status.st_mode) and _named_as_picture(self.name)


def entries(folder: str | Path) -> list[Found]:
    """Look at what a folder holds, sorted by name, hidden entries left out.

    Raises:
        DataError: The folder cannot be read, or a link that may stand for pictures leads nowhere.
    """
    path = Path(folder)
    try:
        with os.scandir(folder) as scanned:
            shown = sorted((e for e in scanned if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(
            f"The image folder {printable(path)} cannot be read: {error.strerror}.{_near(path)}"
        ) from error
    looked_at = (_look(entry) for entry in shown)
    return [found for found in looked_at if found is not None]


@dataclass
class Walk:
    """The pictures below class folders of one root.

    A folder that links lead to more than once counts once in each class, and a link to a folder
    that holds the root not at all: it would lead round in circles.

    Attributes:
        root: What names are relative to.
    """

    root: Path
    _around: frozenset[tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        real = self.root.resolve()
        self._around = frozenset(_identity(os.stat(p)) for p in (real, *real.parents))

    def is_class(self, found: Found) -> bool:
        """Whether an entry of the root is a class folder: a folder that holds not the root."""
        return found.is_folder and _identity(found.status) not in self._around

    def pictures(self, folder: Found | None) -> list[tuple[str, int]]:
        """Return names relative to the root and sizes, sorted by name.

        Args:
            folder: The folder to look below; None for the root itself.

        Raises:
            DataError: A folder cannot be read, or a link leads nowhere.
        """
        start = str(self.root) if folder is None else folder.path
        seen = set(self._around)
        if folder is not None:
            seen.add(_identity(folder.status))
        return sorted(
            (Path(found.path).relative_to(self.root).as_posix(), found.status.st_size)
            for found in _below(start, seen)
        )


def _below(start: str, seen: set[tuple[int, int]]) -> Iterator[Found]:
    """Yield the pictures below a folder, of folders that are not among ``seen``."""
    folders, links = deque([start]), deque[Found]()
    while folders or links:
        # Links last, so that a folder that is there itself goes by its own name.
        if not folders:
            link = links.popleft()
            if _identity(link.status) in seen:
                continue
            seen.add(_identity(link.status))
            folders.append(link.path)
        for found in entries(folders.popleft()):
            if found.is_picture:
                yield found
            elif found.is_folder and found.linked:
                links.append(found)
            elif found.is_folder and _identity(found.status) not in seen:
                seen.add(_identity(found.status))
                folders.append(found.path)


def _look(entry: os.DirEntry[str]) -> Found | None:
    """Look at an entry; None for a link that leads nowhere and stands for no picture."""
    linked = entry.is_symlink()
    try:
        return Found(entry.name, entry.path, os.stat(entry.path), linked)
    except OSError as error:
        name = printable(entry.path)
        if not linked or error.errno not in _LEADS_NOWHERE:
            raise DataError(
                f"{name} cannot be read: {error.strerror}; change its permissions, or take it away."
            ) from error
        # A name without a suffix may be that of a folder, whose pictures would be missed.
        if not (_named_as_picture(entry.name) or not Path(entry.name).suffix):
            return None
        raise DataError(
            f"{name} is a link that leads nowhere ({error.strerror}); put back what it leads to, "
            "or take it away."
        ) from error


def _named_as_picture(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _near(path: Path) -> str:
    try:
        beside = os.listdir(path.parent)
    except OSError:
        return ""
    return "" if path.name in beside else near_matches(path.name, map(printable, beside))
