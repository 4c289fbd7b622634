"""Finished points on disk, so that a sweep that was killed goes on where it stopped.

A point is one JSON file in ``sweep.points``, written whole or not at all and named after its
setting and a digest of everything that decides its numbers: the weights, the code of the network,
the images and the settings. A point of other inputs has another name, so it is never taken.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import __version__
from compress.config import RULES, RunConfig
from compress.errors import ArtefactError
from compress.files import write_atomically
from compress.inputs.load import Inputs
from compress.result import SweepPoint, from_dict, to_dict

STORE_FORMAT = 1
POINTS = "sweep.points"
CHOSEN = "chosen"
# What a sweep's folder may hold; anything else in it is somebody's, and is refused.
_OWN = (POINTS, CHOSEN, "sweep.csv", "config.toml", "report.json", "report.md", "report.html")
_CALIBRATION = "sweep.calibration-"

# Paths, whose content is in the fingerprints; what decides only speed; what decides only whether
# the chosen point is saved; and the rules, of which each point has its own.
_NO_PART = {
    "checkpoint", "model", "data", "test", "output", "class_map", "calibration", "force",
    "device", "threads", "batch_size", "workers", "latency_batch", "latency_table",
    "max_drop", "max_layer_relative_mse", "min_agreement", *RULES,
}  # fmt: skip


def content_key(inputs: Inputs, config: RunConfig, test_points: bool) -> dict[str, Any]:
    """Return what decides every number of a sweep's points, as plain data.

    Args:
        inputs: The network and its images.
        config: Settings; of paths only the content counts.
        test_points: Whether points are measured on the test set as well.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in _NO_PART}
    test = inputs.test if test_points else None
    return {
        "format": STORE_FORMAT,
        "compress": __version__,
        "torch": torch.__version__,
        "weights": inputs.sha256,
        "dtype": str(inputs.dtype),
        "code": _code_digest(inputs.model),
        "fit": inputs.split.fit.fingerprint,
        "validation": inputs.split.validation.fingerprint,
        "test": None if test is None else test.fingerprint,
        "settings": settings,
    }


def _code_digest(model: nn.Module) -> str:
    """Digest of the network's structure and of the source of every module class not torch's own."""
    digest = hashlib.sha256(repr(model).encode())
    classes = {type(module) for module in model.modules()}
    for kind in sorted(classes, key=lambda k: (k.__module__, k.__qualname__)):
        if kind.__module__.split(".")[0] == "torch":
            continue
        try:
            source = inspect.getsource(kind)
        except (OSError, TypeError):  # made at run time: its name and structure must do
            source = kind.__qualname__
        digest.update(source.encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class PointStore:
    """The finished points of one folder, for one content key."""

    folder: Path
    key: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """The key in sixteen digits."""
        plain = json.dumps(self.key, sort_keys=True, default=str)
        return hashlib.sha256(plain.encode()).hexdigest()[:16]

    @property
    def calibration_file(self) -> Path:
        """Where the statistics are kept until the sweep is done."""
        return self.folder / f"{_CALIBRATION}{self.digest}.safetensors"

    def path(self, rule: str, value: float) -> Path:
        """The file of one point."""
        return self.folder / POINTS / f"{rule}-{value!r}-{self.digest}.json"

    def read(self, rule: str, value: float) -> SweepPoint | None:
        """Return a finished point, or None where there is none that can be read."""
        try:
            raw = json.loads(self.path(rule, value).read_text(encoding="utf-8"))
            point = from_dict(SweepPoint, raw["point"], "the point")
        except (OSError, ValueError, KeyError, TypeError, ArtefactError):
            return None  # not there, or damaged: it is measured again
        return point if (point.rule, point.value) == (rule, value) else None

    def write(self, point: SweepPoint) -> None:
        """Keep a finished point."""
        path = self.path(point.rule, point.value)
        path.parent.mkdir(exist_ok=True)
        record = {"key": self.key, "point": to_dict(point)}
        write_atomically(path, json.dumps(record, indent=1, default=str, allow_nan=False) + "\n")

    def forget_calibration(self) -> None:
        """Delete the kept statistics: the sweep is done."""
        self.calibration_file.unlink(missing_ok=True)


def check_folder(output: str, resume: bool, force: bool) -> None:
    """Refuse a folder that a sweep must not write into; call it before hours of work.

    Raises:
        ArtefactError: It is a file, holds something that is no sweep's, or holds a sweep and
            neither ``resume`` nor ``force`` was given.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ArtefactError(f"The output {folder} is a file; pass a folder for the sweep.")
    held = _entries(folder)
    foreign = sorted(set(held) - set(_own(held)))
    if foreign:
        raise ArtefactError(
            f"The output folder {folder} holds {foreign[0]}, which is no part of a sweep; pass a "
            "folder of its own."
        )
    if held and not resume and not force:
        raise ArtefactError(
            f"The output folder {folder} already holds a sweep; pass --resume to go on with it, "
            "--force to start over, or another folder."
        )


def open_folder(output: str, resume: bool, force: bool) -> Path:
    """Make or take the folder that a sweep writes into.

    Args:
        output: The folder; missing parents are made.
        resume: Keep the finished points in it.
        force: Where ``resume`` is not set, delete them, and the rest of the old sweep.

    Raises:
        ArtefactError: As `check_folder`, or it cannot be made.
    """
    check_folder(output, resume, force)
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if force and not resume:
            for name in _own(_entries(folder)):
                remove(folder / name)
    except OSError as error:
        raise ArtefactError(
            f"The output {folder} cannot be written: {error.strerror}; pass another folder."
        ) from error
    return folder


def remove(path: Path) -> None:
    """Delete a file or a folder of the sweep's own, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _own(names: list[str]) -> list[str]:
    """Names that a sweep writes, leftovers of writes that were cut off included."""

    def own(name: str) -> bool:
        partial = name.startswith(".") and name.endswith((".partial", ".old"))
        return name in _OWN or name.startswith(_CALIBRATION) or partial

    return [name for name in names if own(name)]
