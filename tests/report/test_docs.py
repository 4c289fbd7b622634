"""The report's page names every limit; the sample report is current."""

from __future__ import annotations

import hashlib
from pathlib import Path

import jsonschema
from places import DOCS

from compress import report
from compress.report import LIMITS
from compress.report.page import SCRIPTS
from compress.report.schema import report_schema


def test_every_limit_is_documented() -> None:
    page = (DOCS / "reference" / "report.md").read_text(encoding="utf-8")
    for name in LIMITS:
        assert f"`{name}`" in page


def test_the_vendored_library_is_the_one_named() -> None:
    vendor = Path(report.__file__).parent / "vendor"
    readme = (vendor / "README.txt").read_text(encoding="utf-8")
    scripts = sorted(vendor.glob("*.js"))
    assert [f"vendor/{path.name}" for path in scripts] == sorted(SCRIPTS[:2])
    for path in scripts:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in readme


def test_the_sample_is_a_report_that_this_version_reads() -> None:
    sample = DOCS / "sample"
    found = report.read_report(sample)
    jsonschema.validate(found, report_schema())
    assert found["verdict"] == "failed"
    assert report.render_markdown(found) == (sample / "report.md").read_text(encoding="utf-8")
    page = (sample / "report.html").read_text(encoding="utf-8")
    flips = found["result"]["test"]["to_wrong"]
    assert page.count("data:image/png;base64,") == len(flips) > 0
