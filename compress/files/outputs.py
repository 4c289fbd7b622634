"""Which folders may be written, and which may be replaced."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import ArtefactError
from compress.files.leftovers import target_of
from compress.files.places import check_name

MODEL_FILE = "model.safetensors"
# What was timed of a model, and so is no part of it: equal models are equal bytes.
RUNTIME_FILE = "runtime.json"
CALIBRATION_FILE = "calibration.safetensors"
RECOVERY_FILE = "recovery.safetensors"
EXPORT_FILES = {"onnx": "model.onnx", "pt2": "model.pt2", "aoti": "model.aoti.pt2"}
REPORT_FILES = ("report.json", "report.md", "report.html")


@dataclass(frozen=True)
class OutputKind:
    """What a folder that this package writes may hold.

    Attributes:
        name: What it is, with its article, for messages.
        owns: Whether an entry of this name is this package's own there. Nothing else is ever
            deleted, forced or not: ``--output ~ --force`` must not cost anyone a home folder.
        finished: Whether these entries are worth asking before they are replaced.
        remedy: What to do where something finished stands there.
        parts: Folders inside it, which are of a kind of their own.
    """

    name: str
    owns: Callable[[str], bool]
    finished: Callable[[frozenset[str]], bool]
    remedy: str = "pass --force to replace it, or another folder"
    parts: tuple[tuple[str, OutputKind], ...] = ()

    def foreign(self, folder: Path) -> list[str]:
        """Return the entries, relative to ``folder``, that are not this package's own."""
        found = []
        parts = dict(self.parts)
        for entry in sorted(folder.iterdir()):
            made_for = target_of(entry.name)
            if entry.name in parts and entry.is_dir() and not entry.is_symlink():
                found += [f"{entry.name}/{n}" for n in parts[entry.name].foreign(entry)]
            elif entry.name in parts or not self.owns(made_for or entry.name):
                found.append(entry.name)
            elif made_for is None and entry.is_dir():
                found.append(entry.name)  # a folder under the name of one of our files
        return found


_RESULT_FILES = frozenset(
    (MODEL_FILE, RUNTIME_FILE, *EXPORT_FILES.values(), *REPORT_FILES, "plan.json", "config.toml")
)
# A run whose gates failed leaves its report and no model, and may be repeated without asking.
_FAILED_RUN = frozenset((*REPORT_FILES, "plan.json", "config.toml"))

_POINT = re.compile(r"[a-z_]+-[0-9.e+-]+-[0-9a-f]{16}\.json")
_SWEEP_CALIBRATION = re.compile(r"sweep\.calibration-[0-9a-f]{16}\.safetensors")
_SWEEP_FILES = frozenset(("sweep.csv", "config.toml", *REPORT_FILES))

REPORT = OutputKind("a report", frozenset(REPORT_FILES).__contains__, bool)
RESULT = OutputKind(
    "a result", _RESULT_FILES.__contains__, lambda held: bool(held) and held != _FAILED_RUN
)
UNFINISHED = OutputKind(
    "the work of an unfinished run",
    frozenset(
        (
            MODEL_FILE,
            RUNTIME_FILE,
            CALIBRATION_FILE,
            "plan.json",
            "config.toml",
            RECOVERY_FILE,
        )
    ).__contains__,
    bool,
)
POINTS = OutputKind("the points of a sweep", lambda name: _POINT.fullmatch(name) is not None, bool)
SWEEP = OutputKind(
    "a sweep",
    lambda name: name in _SWEEP_FILES or _SWEEP_CALIBRATION.fullmatch(name) is not None,
    bool,
    "pass --resume to go on with it, --force to start over, or another folder",
    (("sweep.points", POINTS), ("chosen", RESULT)),
)


def kind_of_folder(folder: Path, kinds: Sequence[OutputKind]) -> OutputKind:
    """Return the first of some kinds that a folder holds nothing foreign to, else the first."""
    try:
        return next((k for k in kinds if folder.is_dir() and not k.foreign(folder)), kinds[0])
    except OSError:
        return kinds[0]  # not to be read, as whoever writes there will find out


def check_output(target: str | Path, *, force: bool, kind: OutputKind = RESULT) -> None:
    """Refuse an output folder that must not be replaced; call it before hours of work.

    A folder that does not exist, is empty, or holds the report of a failed run and no model is
    accepted. Something finished is accepted only with ``force``. A folder that holds anything
    else is never accepted.

    Args:
        target: The folder to be written.
        force: Whether something finished may be replaced.
        kind: What the folder is to hold.

    Raises:
        ArtefactError: The target is a file, the working folder, a mount point, somebody else's
            folder, has too long a name, or holds something finished and ``force`` is not set.
    """
    target = Path(target).absolute()
    check_name(target)
    if not os.path.exists(target):
        if target.is_symlink():
            raise ArtefactError(f"The output {target} is a link to nothing; remove it first.")
        return
    if not target.is_dir():
        raise ArtefactError(f"The output {target} is a file; pass a folder for {kind.name}.")
    real = target.resolve()
    if os.path.ismount(real) or Path.cwd().resolve().is_relative_to(real):
        raise ArtefactError(
            f"The output {target} is a mount point, or holds the working folder, and cannot be "
            "replaced in one step; pass a folder inside it."
        )
    try:
        held = [entry.name for entry in real.iterdir() if target_of(entry.name) is None]
        foreign = kind.foreign(real)
    except OSError as error:
        raise ArtefactError(f"The output {target} cannot be read: {error.strerror}.") from error
    if foreign:
        more = f" and {len(foreign) - 1} more entries" if len(foreign) > 1 else ""
        raise ArtefactError(
            f"The output folder {target} holds {foreign[0]}{more}, which would be lost because "
            f"{kind.name} does not hold such files; pass another folder."
        )
    if kind.finished(frozenset(held)) and not force:
        raise ArtefactError(f"The output folder {target} already holds {kind.name}; {kind.remedy}.")


def check_apart(
    target: str | Path, inputs: Iterable[str | Path], folders: Iterable[str | Path] = ()
) -> None:
    """Refuse an output that is an input, holds one, or lies in a folder that is read whole.

    Args:
        target: The output.
        inputs: Files and folders that are read.
        folders: Those of them in which everything is read.

    Raises:
        ArtefactError: It is: writing there would cost the user that input, or the next run would
            take the result for data.
    """
    real = Path(target).resolve()
    for path in inputs:
        if Path(path).resolve().is_relative_to(real):
            raise ArtefactError(
                f"The output {target} would replace the input {path}; pass an output elsewhere."
            )
    for folder in folders:
        if real.is_relative_to(Path(folder).resolve()):
            raise ArtefactError(
                f"The output {target} lies in the input {folder}, where the next run would read it "
                "as data; pass an output elsewhere."
            )
