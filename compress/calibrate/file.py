"""A calibration on disk: written once, reused, refused where model or data differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.calibrate.statistics import Calibration, LayerStatistics, Source
from compress.errors import CalibrationError
from compress.files import write_atomically
from compress.linalg.moments import Moments

_KEY = "compress_calibration"
FORMAT = 2


@dataclass(frozen=True)
class CalibrationKey:
    """What statistics depend on; a file is reused where all of it agrees.

    Attributes:
        model: Fingerprint of the weights.
        data: Fingerprint of the images and their split.
        settings: Whatever else decides the statistics, such as the metric and the seed.
    """

    model: str
    data: str
    settings: Mapping[str, Any]


def write_calibration(path: str | Path, calibration: Calibration, key: CalibrationKey) -> None:
    """Write a calibration and what it depends on, atomically."""
    tensors: dict[str, Tensor] = {}
    for name, statistics in calibration.statistics.items():
        for role, moments in statistics.moments().items():
            for part, tensor in moments.tensors().items():
                tensors[f"{name}|{role}|{part}"] = tensor.cpu()
    header = {
        "format": FORMAT,
        "model": key.model,
        "data": key.data,
        "settings": dict(key.settings),
        "images": calibration.source.images,
        "metric": calibration.metric,
    }
    metadata = {_KEY: json.dumps(header, sort_keys=True)}
    write_atomically(path, safetensors.torch.save(tensors, metadata=metadata))


def read_calibration(path: str | Path, key: CalibrationKey) -> Calibration:
    """Read a calibration made for the same model, data and settings.

    Raises:
        CalibrationError: No calibration, damaged, or made from something else; it says what.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CalibrationError(
            f"The calibration {path} cannot be read ({error}); delete it to calibrate anew."
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CalibrationError(
            f"{path} is not a calibration that this version of compress reads; pass another file."
        )
    wanted = {"model": key.model, "data": key.data, "settings": dict(key.settings)}
    found = header.get("settings")
    if isinstance(found, dict) and set(key.settings.get("statistics", ())) <= set(
        found.get("statistics", ())
    ):
        # Statistics for more schemes than are wanted hold all that is needed.
        wanted["settings"] = {**key.settings, "statistics": found["statistics"]}
    for what, value in wanted.items():
        if header.get(what) != value:
            raise CalibrationError(
                f"The calibration {path} was made with other {what} "
                f"({_differences(header.get(what), value)}); pass another file name to "
                "calibrate anew, or the inputs it was made with."
            )
    statistics: dict[str, LayerStatistics] = {}
    grouped: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        site, role, part = name.rsplit("|", 2)
        grouped.setdefault((site, role), {})[part] = tensor
    for (site, role), parts in grouped.items():
        setattr(statistics.setdefault(site, LayerStatistics()), role, Moments.from_tensors(parts))
    source = Source(int(header["images"]), key.data, key.model)
    return Calibration(statistics, source, str(header["metric"]))


def _differences(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [k for k in sorted({*found, *wanted}) if found.get(k) != wanted.get(k)]
        return ", ".join(f"{k}: {found.get(k)} there, {wanted.get(k)} here" for k in keys)
    return f"{str(found)[:16]}… there, {str(wanted)[:16]}… here"
