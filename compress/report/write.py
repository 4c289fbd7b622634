"""The files of a report in a result folder."""

from __future__ import annotations

import json
from pathlib import Path

from compress.files import write_atomically
from compress.report.build import Report
from compress.report.markdown import render_markdown
from compress.report.page import Pictures, render_html
from compress.report.points import render_csv


def render_json(report: Report) -> str:
    """Return a report as it stands in ``report.json``."""
    return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_report(
    report: Report, folder: str | Path, pictures: Pictures | None = None
) -> list[Path]:
    """Write ``report.json``, ``report.md`` and ``report.html``, and ``sweep.csv`` for a sweep.

    Each file appears whole or not at all.

    Args:
        report: A report of any kind.
        folder: An existing folder.
        pictures: As `render_html`.

    Returns:
        The files written.

    Raises:
        ArtefactError: The folder is missing or unwritable, or the disk is full.
    """
    folder = Path(folder)
    files = {
        "report.json": render_json(report),
        "report.md": render_markdown(report),
        "report.html": render_html(report, pictures),
    }
    if report["kind"] == "sweep":
        files["sweep.csv"] = render_csv(report)
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]
