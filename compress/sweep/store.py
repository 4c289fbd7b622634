"""Finished points on disk, so that a sweep that was killed goes on where it stopped.

A point is one JSON file in ``sweep.points``, written whole or not at all and named after its
setting and a digest of everything that decides its numbers: the weights, the code of the network,
the images and the settings. A point of other inputs has another name, so it is never taken. What
is in the file carries a digest, and a file that is not what was written stops the sweep.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import __version__
from compress.config import Role, RunConfig, settings_of
from compress.errors import ArtefactError, ModelError, one_line
from compress.files import BrokenSeal, sealed_record, unsealed_record, write_atomically
from compress.inputs.load import Inputs
from compress.libraries import library_of
from compress.report.read import check_point
from compress.result import SweepPoint, from_dict, to_dict
from compress.specs import import_function, split_spec
from compress.untrusted import read_json

STORE_FORMAT = 5
POINTS = "sweep.points"
CHOSEN = "chosen"
_CALIBRATION = "sweep.calibration-"
_REMEDY = "delete it, and it is measured again"

# Places, whose content is in the fingerprints; what decides only speed; what decides only whether
# the chosen point is saved; and the rules, of which each point has its own.
_NO_PART = settings_of(Role.PLACE, Role.SPEED, Role.PERMISSION, Role.TIMING, Role.GATE, Role.RULE)


def content_key(
    inputs: Inputs, config: RunConfig, *, test_points: bool, deployed_on: str = ""
) -> dict[str, Any]:
    """Return what decides every number of a sweep's points, as plain data.

    Args:
        inputs: The network and its images.
        config: Settings; of paths only the content counts.
        test_points: Whether points are measured on the test set as well.
        deployed_on: The runtime that files of points are made for; "" for none.
    """
    settings = {k: v for k, v in config.settings().items() if k not in _NO_PART}
    test = inputs.test if test_points else None
    return {
        "format": STORE_FORMAT,
        "compress": __version__,
        "torch": torch.__version__,
        "weights": inputs.sha256,
        "dtype": str(inputs.dtype),
        "code": _code_digest(inputs.model, config),
        "fit": inputs.split.fit.fingerprint,
        "validation": inputs.split.validation.fingerprint,
        "test": None if test is None else test.fingerprint,
        "settings": settings,
        "deployed_on": deployed_on,
        # Files of points are timed beside those of the dense network.
        "deployed_timing": [config.latency_batch, config.no_latency] if deployed_on else [],
    }


def _code_digest(model: nn.Module, config: RunConfig) -> str:
    """Digest of the network's structure and of all files with code that decides numbers.

    That is those of its module classes, torch's own apart, of the user's factory and functions.
    """
    digest = hashlib.sha256(repr(model).encode())
    modules = {type(module).__module__ for module in model.modules()}
    head = split_spec(config.model, ModelError)[0] if config.model else ""
    own = head if library_of(head) is None else ""
    for spec in filter(None, (own, config.loss_fn, config.metric_fn)):
        modules.add(import_function(spec, ModelError).__module__)
    for name in sorted(modules):
        if name.split(".")[0] == "torch":
            continue
        digest.update(_source(name).encode())
    return digest.hexdigest()


def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):  # made at run time: its name must do
        return module


@dataclass(frozen=True)
class PointStore:
    """The finished points of one folder, for one content key.

    Attributes:
        folder: The sweep's folder.
        key: What decides the points' numbers; see `content_key`.
        resume: Whether points that are there already count.
    """

    folder: Path
    key: Mapping[str, Any]
    resume: bool = True

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
        """Return a finished point, or None where there is none.

        Raises:
            ArtefactError: The file is not what was written under this name.
        """
        path = self.path(rule, value)
        if not self.resume or not path.exists():
            return None
        try:
            record = unsealed_record(read_json(path))
            point = from_dict(SweepPoint, record["point"], "the point")
            check_point(to_dict(point), "the point")
        except BrokenSeal as error:
            raise ArtefactError(f"The finished point {path} {error}; {_REMEDY}.") from error
        except (OSError, ValueError, KeyError, TypeError, ArtefactError) as error:
            raise ArtefactError(
                f"The finished point {path} is damaged ({one_line(error)}); {_REMEDY}."
            ) from error
        mine = (point.rule, point.value) == (rule, value)
        if not mine or record.get("key") != json.loads(json.dumps(self.key, default=str)):
            raise ArtefactError(
                f"The finished point {path} is of other inputs than its name says; {_REMEDY}."
            )
        return point

    def write(self, point: SweepPoint) -> None:
        """Keep a finished point, with a digest of it and of what it depends on.

        Raises:
            ArtefactError: It cannot be written.
        """
        path = self.path(point.rule, point.value)
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise ArtefactError(
                f"The sweep's points cannot be written: {path.parent}: {error.strerror}."
            ) from error
        record = sealed_record({"key": self.key, "point": to_dict(point)})
        write_atomically(path, json.dumps(record, indent=1, allow_nan=False) + "\n")

    def open(self) -> None:
        """Make the folder, and clear what an interrupted sweep left that does not count.

        Raises:
            ArtefactError: It cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.resume:
                self.calibration_file.unlink(missing_ok=True)
        except OSError as error:
            raise ArtefactError(
                f"The output {self.folder} cannot be written: {error.strerror}; pass another "
                "folder."
            ) from error

    def tidy(self, folder: Path, points: Iterable[SweepPoint]) -> None:
        """Take out of a copy of the folder what a finished sweep does not need.

        Those are the statistics and, unless the sweep was resumed, points that are not its own.
        """
        for kept in folder.glob(f"{_CALIBRATION}*.safetensors"):
            kept.unlink()
        own = {self.path(point.rule, point.value).name for point in points}
        for found in (folder / POINTS).glob("*.json"):
            if not self.resume and found.name not in own:
                found.unlink()
