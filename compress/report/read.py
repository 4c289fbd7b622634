"""Reading reports back, with a clear word for every way in which a file can be none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from compress.errors import ArtefactError
from compress.report.build import REPORT_FORMAT, Report, headline
from compress.result import GateResult, Result, SweepResult, from_dict, to_dict

_KEYS = {
    "run": {"verdict", "headline", "gates", "notes", "baseline", "result"},
    "sweep": {"verdict", "notes", "sweep"},
    "several": {"verdict", "notes", "runs"},
}
_VERDICTS = ("passed", "failed", "unverified")
_BASELINE_KEYS = {"name", "rows", "layers", "classes"}


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
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(
            f"There is no report at {path}; pass a result folder, its model.safetensors or a "
            "report.json."
        ) from error
    except OSError as error:
        raise ArtefactError(f"The report {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
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
        sweep = from_dict(SweepResult, raw["sweep"], f"{where}: sweep")
        return {**raw, "sweep": to_dict(sweep)}
    if raw["kind"] == "several":
        _require_list(raw["runs"], f"{where}: runs")
        runs = [check_report(run, f"{where}: runs[{i}]") for i, run in enumerate(raw["runs"])]
        return {**raw, "runs": runs}
    # Through the record and back, so that what a renderer looks for is there.
    result = to_dict(from_dict(Result, raw["result"], f"{where}: result"))
    _require_list(raw["gates"], f"{where}: gates")
    gates = [
        to_dict(from_dict(GateResult, gate, f"{where}: gates[{i}]"))
        for i, gate in enumerate(raw["gates"])
    ]
    baseline = raw["baseline"]
    if baseline is not None and (not isinstance(baseline, dict) or set(baseline) != _BASELINE_KEYS):
        raise ArtefactError(f"{where} has a damaged baseline; compare with the baseline again.")
    return {**raw, "result": result, "headline": headline(result), "gates": gates}


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
