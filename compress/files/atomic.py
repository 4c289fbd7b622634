"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compress.errors import ArtefactError
from compress.files.exchange import exchange
from compress.files.leftovers import OLD, claimed, clear_leftovers, hidden, remove, target_of
from compress.files.outputs import RESULT, OutputKind, check_output
from compress.files.undisturbed import undisturbed

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits, read in pieces.

    Raises:
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write a file whole or not at all: a hidden file beside it, then one rename.

    Text is written as UTF-8, and halves of characters as escapes. The file keeps the permissions
    that a plain ``open`` would give it. What an earlier process left behind of the same file is
    cleared.

    Raises:
        ArtefactError: The folder is missing or unwritable, or the disk is full; what stood at
            ``path`` before still stands.
    """
    path = Path(path)
    encoded = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    clear_leftovers(path)
    try:
        with claimed(path, _new_file) as partial:
            with open(partial, "wb") as file:
                file.write(encoded)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _new_file(path: Path) -> None:
    open(path, "xb").close()


@contextmanager
def atomic_folder(target: str | Path, *, force: bool, kind: OutputKind = RESULT) -> Iterator[Path]:
    """Give a temporary folder that becomes ``target`` when the block ends well.

    On any exception, KeyboardInterrupt included, the temporary folder and the parents made for it
    vanish, and whatever stood at ``target`` still stands. A process that is killed leaves either
    the earlier folder or the new one at ``target``, whole, and perhaps a hidden folder beside it,
    which the next one to write there clears.

    Args:
        target: The folder to appear. Missing parents are made. A link is followed.
        force: Whether something finished there may be replaced, see `check_output`.
        kind: What the folder is to hold, which decides what may be replaced.

    Yields:
        The temporary folder, a sibling of ``target``.

    Raises:
        ArtefactError: The target is refused, unwritable, or the disk is full.
    """
    check_output(target, force=force, kind=kind)
    final = Path(target).absolute().resolve()
    with _becoming(final) as partial:
        yield partial
        check_output(target, force=force, kind=kind)  # another may have finished meanwhile


@contextmanager
def atomic_update(folder: str | Path) -> Iterator[Path]:
    """Give a copy of an existing folder that takes its place when the block ends well.

    Files are linked where the file system allows it, so that nothing large is copied: replace
    them (as `write_atomically` does), and never write into one.

    Yields:
        The copy, a sibling of ``folder``. On any exception it vanishes.

    Raises:
        ArtefactError: The folder is unwritable, or the disk is full.
    """
    final = Path(folder).absolute().resolve()
    with _becoming(final) as partial:
        if final.is_dir():
            shutil.copytree(
                final, partial, symlinks=True, copy_function=_link, dirs_exist_ok=True,
                ignore=lambda _, names: [n for n in names if target_of(n) is not None],
            )  # fmt: skip
        yield partial


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without links, or a limit to their number
        shutil.copy2(source, target, follow_symlinks=False)


@contextmanager
def _becoming(final: Path) -> Iterator[Path]:
    """Give a hidden folder that takes the place of ``final`` when the block ends well."""
    clear_leftovers(final)
    parents = [p for p in final.parents if not p.exists()]
    partial: Path | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with claimed(final, Path.mkdir) as partial:
            yield partial
            with undisturbed():
                _swap(partial, final)
    except BaseException as error:
        for parent in parents:
            with suppress(OSError):
                parent.rmdir()
        # A file in the folder has said it already, of a path that is gone now.
        inner = error.__cause__ if isinstance(error, ArtefactError) else None
        cause = inner if isinstance(inner, OSError) else error
        if (partial is None and isinstance(cause, OSError)) or _is_about(cause, partial):
            raise _cannot_write(final, cause) from error
        raise


def _swap(partial: Path, final: Path) -> None:
    """Put ``partial`` in the place of ``final``, in one step where the system can."""
    if not final.exists():
        partial.rename(final)
    elif not exchange(partial, final):  # what it exchanges for is then deleted under that name
        _swap_in_two_steps(partial, final)


def _swap_in_two_steps(partial: Path, final: Path) -> None:
    """Put the old folder aside and bring it back where the second rename fails.

    Killed between the two, the next to write there brings it back (`clear_leftovers`).
    """
    old = hidden(final, OLD)
    final.rename(old)
    try:
        partial.rename(final)
    except BaseException:
        old.rename(final)
        raise
    with suppress(OSError):
        remove(old)


def _is_about(error: BaseException, folder: Path | None) -> bool:
    """Whether an error raised while filling ``folder`` says that it cannot be written."""
    if isinstance(error, OSError):
        named = str(error.filename or "")
        return error.errno in _FULL or (folder is not None and named.startswith(str(folder)))
    # safetensors and torch wrap the operating system's error in their own types.
    return isinstance(error, Exception) and "No space left on device" in str(error)


def _cannot_write(path: Path, error: BaseException) -> ArtefactError:
    number = error.errno if isinstance(error, OSError) else errno.ENOSPC
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    remedy = (
        "free some space or pass an output on another disk"
        if number in _FULL
        else "check that its parent exists and that you may write there"
    )
    return ArtefactError(f"{path} cannot be written: {reason}; {remedy}. Nothing was left behind.")
