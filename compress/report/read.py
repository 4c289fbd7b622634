"""Reading reports back, with a clear word for every way in which a file can be none."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import ArtefactError
from compress.report.build import REPORT_FORMAT, Report, headline
from compress.result import GateResult, Result, SweepResult, from_dict, to_dict
from compress.untrusted import Unreadable, read_json

_KEYS = {
    "run": {"verdict", "headline", "gates", "notes", "baseline", "result"},
    "sweep": {"verdict", "notes", "sweep"},
    "several": {"verdict", "notes", "runs"},
}
_VERDICTS = ("passed", "failed", "unverified")
_UNITS = ("points", "fraction", "ratio", "number")


@dataclass(frozen=True)
class _Row:
    """A figure beside the baseline's."""

    key: str
    label: str
    unit: str
    before: float | None
    now: float | None
    change: float | None
    better: bool | None


@dataclass(frozen=True)
class _Treatment:
    """A layer that the baseline treats otherwise."""

    name: str
    scheme_before: str
    ranks_before: tuple[int, ...]
    scheme_now: str
    ranks_now: tuple[int, ...]
    width_before: tuple[int, int] | None = None
    width_now: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Class:
    """A class whose accuracy is not the baseline's."""

    name: str
    before: float | None
    now: float | None
    change: float | None


@dataclass(frozen=True)
class _Baseline:
    """What changed since an earlier report, as `compare_with_baseline` writes it."""

    name: str
    rows: tuple[_Row, ...]
    layers: tuple[_Treatment, ...]
    classes: tuple[_Class, ...]


def read_report(path: str | Path) -> Report:
    """Read a report from its file, its result folder, or another file of that folder.

    Raises:
        ArtefactError: There is no report, it cannot be read, is truncated, was written by a newer
            version, or does not hold what a report holds.
    """
    path = Path(path)
    if os.path.isdir(path):
        path = path / "report.json"
    elif path.suffix != ".json":
        path = path.with_name("report.json")
    try:
        raw = read_json(path)
    except FileNotFoundError as error:
        raise ArtefactError(
            f"There is no report at {path}; pass a result folder, its model.safetensors or a "
            "report.json."
        ) from error
    except OSError as error:
        raise ArtefactError(f"The report {path} cannot be read: {error.strerror}.") from error
    except Unreadable as error:
        raise ArtefactError(
            f"The report {path} is not valid JSON ({error}); it may be truncated. Run the command "
            "that wrote it again."
        ) from error
    return check_report(raw, f"the report {path}")


def check_report(raw: Any, where: str) -> Report:
    """Return ``raw`` if it is a report that this version can read.

    Raises:
        ArtefactError: As `read_report`.
    """
    if not isinstance(raw, dict) or "format" not in raw or raw.get("kind") not in _KEYS:
        raise ArtefactError(
            f"{where} is not a report of compress: it has no 'format' and 'kind' that one has."
        )
    if not isinstance(raw["format"], int) or raw["format"] > REPORT_FORMAT:
        raise ArtefactError(
            f"{where} has format {raw['format']} and this version of compress reads up to "
            f"{REPORT_FORMAT}; update compress to read it."
        )
    missing = sorted(_KEYS[raw["kind"]] - set(raw))
    if missing:
        raise ArtefactError(
            f"{where} lacks {', '.join(missing)}; it is damaged. Run the command that wrote it "
            "again."
        )
    _check_common(raw, where)
    if raw["kind"] == "sweep":
        return {**raw, "sweep": _checked_sweep(raw["sweep"], f"{where}: sweep")}
    if raw["kind"] == "several":
        _require_list(raw["runs"], f"{where}: runs")
        runs = [_checked_part(run, f"{where}: runs[{i}]") for i, run in enumerate(raw["runs"])]
        return {**raw, "runs": runs}
    # Through the record and back, so that what a renderer looks for is there.
    result = to_dict(from_dict(Result, raw["result"], f"{where}: result"))
    _check_numbers(result, f"{where}: result")
    _require_list(raw["gates"], f"{where}: gates")
    gates = [
        to_dict(from_dict(GateResult, gate, f"{where}: gates[{i}]"))
        for i, gate in enumerate(raw["gates"])
    ]
    _check_given(gates, ("limit",), f"{where}: gates")
    checked = {"result": result, "headline": headline(result), "gates": gates}
    return {**raw, **checked, "baseline": _checked_baseline(raw["baseline"], where)}


def _checked_sweep(raw: Any, where: str) -> dict[str, Any]:
    sweep = to_dict(from_dict(SweepResult, raw, where))
    for i, point in enumerate(sweep["points"]):
        check_point(point, f"{where}: points[{i}]")
    return sweep


def check_point(point: dict[str, Any], where: str) -> None:
    """Check that a sweep's point, as plain data, holds what whoever shows it relies on.

    Raises:
        ArtefactError: A number is missing, or half of an end metric.
    """
    _check_given([point], ("value", "ratio"), where)
    for name in ("validation", "test"):
        _check_metric(point[name], f"{where}.{name}")


def _checked_part(raw: Any, where: str) -> Report:
    """Check one run of a comparison, which beside a report has a name."""
    kind = raw.get("kind") if isinstance(raw, dict) else None
    if kind != "run" or not isinstance(raw.get("name"), str):
        raise ArtefactError(f"{where} is not a run with a name; compare the results again.")
    return check_report(raw, where)


def _checked_baseline(raw: Any, where: str) -> dict[str, Any] | None:
    if raw is None:
        return None
    try:
        baseline = to_dict(from_dict(_Baseline, raw, "the baseline"))
    except ArtefactError as error:
        raise ArtefactError(
            f"{where} has a damaged baseline ({error}) Compare with the baseline again."
        ) from error
    if any(row["unit"] not in _UNITS for row in baseline["rows"]):
        raise ArtefactError(f"{where} has a damaged baseline; compare with the baseline again.")
    return baseline


def _check_numbers(result: dict[str, Any], where: str) -> None:
    """Check what the types of a result do not say, and whoever shows it relies on."""
    for name in ("validation", "test"):
        _check_metric(result[name], f"{where}.{name}")
    for name in ("latency", "beside"):
        times = result["cost"][name]
        _check_given(times, ("dense_seconds", "seconds", "ratio"), f"{where}.cost.{name}")


def _check_metric(metric: dict[str, Any] | None, where: str) -> None:
    """Check that an end metric is whole: none, one of the user's own, or accuracies with all."""
    if metric is None:
        return
    if metric["custom"]:
        if metric["drop_interval"]:
            _check_given([metric["drop_interval"]], ("low", "high"), f"{where}.drop_interval")
            _check_given([metric], ("drop",), where)
        return
    names = ("top1_before", "top1_after", "drop", "drop_interval", "mcnemar_p")
    known = [name for name in names if metric[name] is not None]
    if known and len(known) < len(names):
        raise _inconsistent(f"{where} holds {known[0]} and not all of {', '.join(names)}")
    if known:
        _check_given([metric["drop_interval"]], ("low", "high"), f"{where}.drop_interval")
        _check_given([metric], ("to_wrong_count", "to_right_count", "other_flips"), where)
    flips = [*metric["to_wrong"], *metric["to_right"]]
    _check_given(flips, ("confidence_before", "confidence_after"), f"{where}: a changed image")
    classes = len(metric["classes"])
    if any(flip[key] >= classes for flip in flips for key in ("label", "before", "after")):
        raise _inconsistent(f"{where} has a changed image of a class that has no name")
    if len(metric["bins_before"]) != len(metric["bins_after"]):
        raise _inconsistent(f"{where} has other bins of confidence before than after")
    for name in ("before", "after"):
        bins = [b for b in metric[f"bins_{name}"] if b["images"]]
        _check_given(bins, ("confidence", "accuracy"), f"{where}.bins_{name}")


def _check_given(rows: list[dict[str, Any]], names: tuple[str, ...], where: str) -> None:
    for row in rows:
        for name in names:
            if row[name] is None:
                raise _inconsistent(f"{where} lacks the number {name!r}")


def _inconsistent(reason: str) -> ArtefactError:
    return ArtefactError(
        f"{reason}; the file was edited or is damaged. Run the command that wrote it again."
    )


def _check_common(raw: Report, where: str) -> None:
    if raw["verdict"] not in _VERDICTS:
        raise ArtefactError(
            f"{where}: verdict is {raw['verdict']!r}, not one of {', '.join(_VERDICTS)}; the file "
            "was edited or is damaged."
        )
    _require_list(raw["notes"], f"{where}: notes")
    for note in raw["notes"]:
        if not isinstance(note, str):
            raise ArtefactError(f"{where}: notes holds {note!r}, which is not text.")


def _require_list(value: Any, where: str) -> None:
    if not isinstance(value, list):
        raise ArtefactError(
            f"{where} should be a list and is {type(value).__name__}; the file was edited or is "
            "damaged. Run the command that wrote it again."
        )


def result_of(report: Report) -> Result:
    """Return the result record that a run's report was built from."""
    return from_dict(Result, report["result"], "the report: result")
