"""A calibration on disk: written once, reused, refused where model or data differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from compress.calibrate.statistics import Calibration, LayerStatistics, Source
from compress.config import METRICS
from compress.errors import CalibrationError
from compress.files import write_atomically
from compress.linalg.moments import Moments
from compress.untrusted import Unreadable, parse_json
from compress.untrusted.tensors import read_tensors

_KEY = "compress_calibration"
FORMAT = 2
_ROLES = ("inputs", "outputs", "weighting", "pooled")


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
        found = read_tensors(path)
        header = parse_json(found.metadata.get(_KEY, "null"))
    except (OSError, Unreadable) as error:
        raise CalibrationError(
            f"The calibration {path} cannot be read ({error}); delete it to calibrate anew."
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CalibrationError(
            f"{path} is not a calibration that this version of compress reads; pass another file."
        )
    wanted = {"model": key.model, "data": key.data, "settings": dict(key.settings)}
    settings = header.get("settings")
    there = settings.get("statistics") if isinstance(settings, dict) else None
    if isinstance(there, list) and all(s in there for s in key.settings.get("statistics", ())):
        # Statistics for more schemes than are wanted hold all that is needed.
        wanted["settings"] = {**key.settings, "statistics": there}
    for what, value in wanted.items():
        if header.get(what) != value:
            raise CalibrationError(
                f"The calibration {path} was made with other {what} "
                f"({_differences(header.get(what), value)}); pass another file name to "
                "calibrate anew, or the inputs it was made with."
            )
    try:
        statistics = _statistics(found.tensors)
        images, metric = header.get("images"), header.get("metric")
        if type(images) is not int or images < 1 or metric not in METRICS:
            raise Unreadable(f"it is of {str(images)[:20]} images in the metric {metric!r}")
    except Unreadable as error:
        raise CalibrationError(
            f"The calibration {path} is damaged: {error}; delete it to calibrate anew."
        ) from error
    return Calibration(statistics, Source(images, key.data, key.model), str(metric))


def _statistics(tensors: Mapping[str, Tensor]) -> dict[str, LayerStatistics]:
    """Put statistics together again from what `write_calibration` named ``layer|role|part``.

    Raises:
        Unreadable: A name is no such name, a part is missing, or one does not fit the others.
    """
    grouped: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        site, role, part = ("", "", *name.rsplit("|", 2))[-3:]
        if role not in _ROLES:
            raise Unreadable(f"its entry {name[:60]!r} is none of a calibration's")
        grouped.setdefault((site, role), {})[part] = tensor
    statistics: dict[str, LayerStatistics] = {}
    for (site, role), parts in grouped.items():
        _check_moments(f"{site[:60]}|{role}", parts)
        setattr(statistics.setdefault(site, LayerStatistics()), role, Moments.from_tensors(parts))
    for site, one in statistics.items():
        _check_together(site, one)
    return statistics


def _check_moments(name: str, parts: Mapping[str, Tensor]) -> None:
    if set(parts) != {"count", "mean", "scatter"}:
        raise Unreadable(f"{name} holds {', '.join(sorted(parts))[:60]}")
    count, mean, scatter = parts["count"], parts["mean"], parts["scatter"]
    fits = (
        (count.dtype, mean.dtype, scatter.dtype) == (torch.int64, torch.float64, torch.float64)
        and count.ndim == 0
        and mean.ndim == 2
        and scatter.shape == (*mean.shape, mean.shape[1])
        and mean.numel() > 0
    )
    if not fits:
        raise Unreadable(f"the parts of {name} do not fit each other")
    finite = bool(torch.isfinite(mean).all()) and bool(torch.isfinite(scatter).all())
    if int(count) < 0 or not finite:
        raise Unreadable(f"{name} holds numbers that no statistics have")


def _check_together(site: str, statistics: LayerStatistics) -> None:
    if statistics.inputs is None and statistics.outputs is None:
        raise Unreadable(f"the layer {site[:60]!r} has no statistics of its inputs or outputs")
    groups = {moments.mean.shape[0] for moments in statistics.moments().values()}
    if len(groups) > 1:
        raise Unreadable(f"the statistics of the layer {site[:60]!r} do not fit each other")


def _differences(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [k for k in sorted({*found, *wanted}) if found.get(k) != wanted.get(k)]
        return ", ".join(f"{k}: {found.get(k)} there, {wanted.get(k)} here" for k in keys)
    return f"{str(found)[:16]}… there, {str(wanted)[:16]}… here"
