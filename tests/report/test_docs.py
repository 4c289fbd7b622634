"""The examples on the report's pages run as they stand."""

import hashlib
import re
from pathlib import Path

import jsonschema
import pytest
import report_examples as examples
from places import DOCS

from compress import report
from compress.report import LIMITS, build_report, write_report
from compress.report.page import SCRIPTS
from compress.report.schema import report_schema


@pytest.mark.parametrize(
    ("page", "printed"),
    [("report.md", ["drop of accuracy is", "failed"]), ("report-schema.md", ["'layers'"])],
)
def test_examples_run(page, printed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "result").mkdir()
    write_report(build_report(examples.result()), tmp_path / "result")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})
    shown = capsys.readouterr().out
    for words in printed:
        assert words in shown


def test_every_limit_is_documented():
    page = (DOCS / "report.md").read_text(encoding="utf-8")
    for name in LIMITS:
        assert f"`{name}`" in page


def test_the_vendored_library_is_the_one_named():
    vendor = Path(report.__file__).parent / "vendor"
    readme = (vendor / "README.txt").read_text(encoding="utf-8")
    scripts = sorted(vendor.glob("*.js"))
    assert [f"vendor/{path.name}" for path in scripts] == sorted(SCRIPTS[:2])
    for path in scripts:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in readme


def test_the_sample_is_a_report_that_this_version_reads():
    sample = DOCS / "sample"
    found = report.read_report(sample)
    jsonschema.validate(found, report_schema())
    assert found["verdict"] == "failed"
    assert report.render_markdown(found) == (sample / "report.md").read_text(encoding="utf-8")
    page = (sample / "report.html").read_text(encoding="utf-8")
    flips = found["result"]["test"]["to_wrong"]
    assert page.count("data:image/png;base64,") == len(flips) > 0
