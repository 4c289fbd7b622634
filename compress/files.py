"""Writing results so that a reader never meets half of one."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compress.errors import ArtefactError

MODEL_FILE = "model.safetensors"
REPORT_FILE = "report.json"

# What a result folder may hold. `atomic_folder` deletes nothing that matches none of these, forced
# or not: `--output ~ --force` must not cost anyone a home folder.
RESULT_FILES = (
    MODEL_FILE,
    "report.*",
    "plan.json",
    "config.toml",
    "calibration.safetensors",
    "sweep.*",
)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits, read in pieces.

    Raises:
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write a file whole or not at all: a temporary file beside it, then one rename.

    Text is written as UTF-8. The file keeps the permissions that a plain ``open`` would give it.

    Raises:
        ArtefactError: The folder is missing or unwritable, or the disk is full; what stood at
            ``path`` before still stands.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def check_output(target: str | Path, force: bool) -> None:
    """Refuse an output folder that must not be replaced; call it before hours of work.

    A folder that does not exist, is empty, or holds the report of a failed run and no model is
    accepted. A finished result is accepted with ``force`` alone. A folder that holds anything a
    result does not is never accepted.

    Raises:
        ArtefactError: The target is a file, the working folder, a mount point, somebody else's
            folder, or a result without ``force``.
    """
    target = Path(target).absolute()
    if not target.exists():
        if target.is_symlink():
            raise ArtefactError(f"The output {target} is a link to nothing; remove it first.")
        return
    if not target.is_dir():
        raise ArtefactError(f"The output {target} is a file; pass a folder for the result.")
    real = target.resolve()
    if os.path.ismount(real) or Path.cwd().resolve().is_relative_to(real):
        raise ArtefactError(
            f"The output {target} is a mount point, or holds the working folder, and cannot be "
            "replaced in one step; pass a folder inside it."
        )
    try:
        held = sorted(entry.name for entry in real.iterdir())
    except OSError as error:
        raise ArtefactError(f"The output {target} cannot be read: {error.strerror}.") from error
    foreign = [n for n in held if not any(fnmatch.fnmatchcase(n, p) for p in RESULT_FILES)]
    if foreign:
        raise ArtefactError(
            f"The output folder {target} holds {foreign[0]}"
            f"{f' and {len(foreign) - 1} more entries' if len(foreign) > 1 else ''}, which are no "
            "part of a result and would be lost; pass another folder."
        )
    failed_run = MODEL_FILE not in held and REPORT_FILE in held
    if held and not failed_run and not force:
        raise ArtefactError(
            f"The output folder {target} already holds a result; pass --force to replace it, "
            "or another folder."
        )


def check_apart(target: str | Path, inputs: Iterable[str | Path]) -> None:
    """Refuse an output that is an input, or a folder with an input in it.

    Raises:
        ArtefactError: It is; writing there would cost the user that input.
    """
    real = Path(target).resolve()
    for path in inputs:
        if Path(path).resolve().is_relative_to(real):
            raise ArtefactError(
                f"The output {target} would replace the input {path}; pass an output elsewhere."
            )


@contextmanager
def atomic_folder(target: str | Path, force: bool) -> Iterator[Path]:
    """Give a temporary folder that becomes ``target`` when the block ends well.

    On any exception, KeyboardInterrupt included, the temporary folder and the parents made for it
    vanish, and whatever stood at ``target`` still stands.

    Args:
        target: The folder to appear. Missing parents are made. A link is followed.
        force: Whether a finished result there may be replaced, see `check_output`.

    Yields:
        The temporary folder, a sibling of ``target``.

    Raises:
        ArtefactError: The target is refused, unwritable, or the disk is full.
    """
    check_output(target, force)
    final = Path(target).absolute().resolve()
    partial = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    parents = [p for p in final.parents if not p.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        check_output(target, force)  # another run may have finished there meanwhile
        _swap(partial, final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in parents:
            with suppress(OSError):
                parent.rmdir()
        # A file in the folder has said it already, of a path that is gone now.
        inner = error.__cause__ if isinstance(error, ArtefactError) else None
        cause = inner if isinstance(inner, OSError) else error
        if _is_about(cause, partial):
            raise _cannot_write(final, cause) from error
        raise


def _swap(partial: Path, final: Path) -> None:
    """Put ``partial`` in the place of ``final``; put the old one back where that fails."""
    if not final.exists():
        partial.rename(final)
        return
    old = final.with_name(f".{final.name}.{secrets.token_hex(4)}.old")
    final.rename(old)
    try:
        partial.rename(final)
    except BaseException:
        old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_about(error: BaseException, folder: Path) -> bool:
    """Whether an error raised while filling ``folder`` says that it cannot be written."""
    if isinstance(error, OSError):
        named = str(error.filename or "")
        return error.errno in _FULL or named.startswith(str(folder))
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
