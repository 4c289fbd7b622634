"""A calibration on disk: written once, reused, refused where model or data differ."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from compress.calibrate.statistics import Calibration, LayerStatistics, Source
from compress.config import METRICS
from compress.errors import CalibrationError
from compress.files import SEAL_KEY, BrokenSeal, check_tensors, sealed_tensors, write_atomically
from compress.linalg.moments import Moments
from compress.untrusted import Unreadable, parse_json
from compress.untrusted.tensors import read_tensors

_KEY = "compress_calibration"
# From 3 on, the file carries a digest of its content.
FORMAT = 3

_REMEDY = "delete it to calibrate anew"
_ROLES = frozenset(field.name for field in fields(LayerStatistics))
_PARTS = frozenset(("count", "mean", "scatter"))
# What float32 may be wrong by, generously: this is to find what was never a covariance.
_ROUNDING, _SLACK = 1e-5, 1e-3
_STRIP = 1024


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
    """Write a calibration, what it depends on and a digest of both, atomically.

    Raises:
        ArtefactError: The file cannot be written.
    """
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
    write_atomically(path, sealed_tensors(safetensors.torch.save(tensors), metadata))


def read_calibration(path: str | Path, key: CalibrationKey) -> Calibration:
    """Read a calibration made for the same model, data and settings.

    Raises:
        CalibrationError: No calibration, damaged, edited since it was written, or made from
            something else; it says what.
    """
    header, tensors = _read(path)
    _check_key(header, key, path)
    images, metric = header.get("images"), header.get("metric")
    if type(images) is not int or images < 1 or metric not in METRICS:
        raise CalibrationError(_no_calibration(path))
    source = Source(images, key.data, key.model)
    return Calibration(_statistics(tensors, path), source, metric)


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors of a calibration that is what was written."""
    try:
        found = read_tensors(path)
        if SEAL_KEY in found.metadata:
            check_tensors(path)
        header = parse_json(found.metadata.get(_KEY, "null"))
        if not isinstance(header, dict):
            raise CalibrationError(_no_calibration(path))
        if header.get("format") != FORMAT:
            raise CalibrationError(
                f"The calibration {path} has format {header.get('format')} and this version of "
                f"compress reads format {FORMAT}; {_REMEDY}."
            )
        if SEAL_KEY not in found.metadata:
            check_tensors(path)  # says so
        return header, found.tensors
    except BrokenSeal as error:
        raise CalibrationError(f"The calibration {path} {error}; {_REMEDY}.") from error
    except (OSError, Unreadable) as error:
        raise CalibrationError(
            f"The calibration {path} cannot be read ({error}); {_REMEDY}."
        ) from error


def _no_calibration(path: str | Path) -> str:
    return f"{path} is not a calibration that compress wrote; pass another file."


def _check_key(header: Mapping[str, Any], key: CalibrationKey, path: str | Path) -> None:
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


def _statistics(tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, LayerStatistics]:
    """Put the tensors together by layer and role; what cannot be statistics is refused."""
    grouped: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        site, role, part = ["", "", *name.rsplit("|", 2)][-3:]
        grouped.setdefault((site, role), {})[part] = tensor
    statistics: dict[str, LayerStatistics] = {}
    for (site, role), parts in grouped.items():
        if role not in _ROLES or parts.keys() != _PARTS:
            raise CalibrationError(_no_calibration(path))
        problem = _problem(parts["count"], parts["mean"], parts["scatter"])
        if problem:
            raise CalibrationError(
                f"The calibration {path} cannot be used: the {role} of layer {site!r} {problem}; "
                f"{_REMEDY}."
            )
        setattr(statistics.setdefault(site, LayerStatistics()), role, Moments.from_tensors(parts))
    for site, one in statistics.items():
        problem = _conflict(one)
        if problem:
            raise CalibrationError(
                f"The calibration {path} cannot be used: the statistics of layer {site!r} "
                f"{problem}; {_REMEDY}."
            )
    return statistics


def _conflict(statistics: LayerStatistics) -> str:
    """Say how a layer's statistics cannot belong together; ``""`` where nothing is found."""
    if statistics.inputs is None and statistics.outputs is None:
        return "are of neither its inputs nor its outputs"
    if len({moments.mean.shape[0] for moments in statistics.moments().values()}) > 1:
        return "have different numbers of groups"
    return ""


def _problem(count: Tensor, mean: Tensor, scatter: Tensor) -> str:
    """Say what no moments of any rows can be; ``""`` where nothing is found."""
    shapes = ((), tuple(mean.shape), (*mean.shape, *mean.shape[1:]))
    types = (torch.int64, torch.float64, torch.float64)
    given = (count, mean, scatter)
    if tuple(tuple(t.shape) for t in given) != shapes or tuple(t.dtype for t in given) != types:
        return "have shapes or types that do not belong together"
    if mean.dim() != 2 or not mean.numel():
        return "have shapes or types that do not belong together"
    if not math.isfinite(float(mean.sum())) or not math.isfinite(float(scatter.sum())):
        return "hold NaN or infinite values"
    rows = int(count)
    if rows < 0 or (rows == 0 and bool(mean.any() or scatter.any())):
        return f"have a count of {rows} rows"
    # Rows are centred in float32, of which constant rows leave their rounding.
    off = _ROUNDING * float(mean.abs().max())
    rounding = rows * off * off  # not a power, which raises where it overflows
    least, most = (float(end) for end in scatter.aminmax())
    allowed = _SLACK * max(-least, most) + rounding
    if not math.isfinite(allowed):
        return "hold numbers too large to compute with"
    if float(scatter.diagonal(dim1=1, dim2=2).min()) < -allowed:
        return "have negative variances"
    if _asymmetry(scatter) > allowed:
        return "are not symmetric"
    return ""


def _asymmetry(scatter: Tensor) -> float:
    """The largest difference to the transpose, by strips: a matrix may fill half a gigabyte."""
    return max(
        float((scatter[:, k : k + _STRIP] - scatter[:, :, k : k + _STRIP].mT).abs().max())
        for k in range(0, scatter.shape[1], _STRIP)
    )


def _differences(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [k for k in sorted({*found, *wanted}) if found.get(k) != wanted.get(k)]
        return ", ".join(f"{k}: {found.get(k)} there, {wanted.get(k)} here" for k in keys)
    return f"{str(found)[:16]}… there, {str(wanted)[:16]}… here"
