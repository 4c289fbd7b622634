"""Reports: a result as JSON, Markdown, HTML and JUnit, held to limits and to earlier reports.

Nothing here measures anything: reports arrange and format what a `compress.result.Result` holds.
"""

from compress.report.baseline import build_comparison, compare_with_baseline
from compress.report.build import build_report, with_gates, with_notes
from compress.report.gates import LIMITS, check_gates, gate_sentence, judged
from compress.report.junit import render_junit
from compress.report.markdown import render_markdown
from compress.report.page import render_html
from compress.report.points import build_sweep_report, render_csv
from compress.report.read import check_report, read_report, result_of
from compress.report.write import render_json, write_report

__all__ = [
    "LIMITS",
    "build_comparison",
    "build_report",
    "build_sweep_report",
    "check_gates",
    "check_report",
    "compare_with_baseline",
    "gate_sentence",
    "judged",
    "read_report",
    "render_csv",
    "render_html",
    "render_json",
    "render_junit",
    "render_markdown",
    "result_of",
    "with_gates",
    "with_notes",
    "write_report",
]
