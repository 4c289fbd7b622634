"""Reports whose words attack: the terminal, a spreadsheet, a page."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest
import report_examples
from workbench import command

from compress.errors import ArtefactError
from compress.report import (
    build_report,
    build_sweep_report,
    check_report,
    render_csv,
    render_html,
    render_json,
    render_markdown,
)

HOSTILE = "\x1b]0;owned\x07\x9b31m\u202ename"


def hostile_report(tmp_path: Path) -> Path:
    result = report_examples.result(model=HOSTILE, warnings=(HOSTILE + "\nVerified: no",))
    layers = (dataclasses.replace(result.layers[1], name=HOSTILE), *result.layers[2:])
    path = tmp_path / "report.json"
    path.write_text(render_json(build_report(dataclasses.replace(result, layers=layers))))
    return path


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_nothing_in_a_report_reaches_the_terminal_as_a_command(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    found = command("report", str(hostile_report(tmp_path)), *flags)
    assert found.exit_code == 0, found.stderr
    assert not {c for c in found.stdout if c != "\n" and not c.isprintable()}
    if flags:
        assert json.loads(found.stdout)["result"]["model"] == HOSTILE
    else:
        assert r"\x1b]0;owned\x07\x9b31m\u202ename" in found.stdout
        assert not any(line.startswith("Verified: no") for line in found.stdout.splitlines()[1:])


def test_nothing_in_an_error_does(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('"\\u001b[2J\\u009b" = 1\n')
    found = command("run", "--config", str(path))
    assert found.exit_code == 2
    assert not {c for c in found.stderr.rstrip("\n") if not c.isprintable()}


def test_pages_and_markdown_show_control_characters_as_text(tmp_path: Path) -> None:
    report = check_report(json.loads(hostile_report(tmp_path).read_text()), "it")
    for page in (render_markdown(report), render_html(report)):
        assert not set("\x1b\x07\x9b\u202e") & set(page)
        assert "x1b" in page


def test_the_hash_of_the_source_is_escaped_as_everything_else() -> None:
    report = build_report(report_examples.result(source_sha256="<img src=x>*_`"))
    assert "<img" not in render_markdown(report)


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_cells_of_a_table_are_no_formulas(start: str) -> None:
    formula = f'{start}HYPERLINK("http://x","y")'
    sweep = report_examples.sweep(2)
    point = dataclasses.replace(sweep.points[0], rule=formula, value=-1.5)
    text = render_csv(build_sweep_report(dataclasses.replace(sweep, points=(point,))))
    (row,) = csv.DictReader(io.StringIO(text))
    assert not any(cell.startswith(("=", "+", "@", "\t", "\r")) for cell in row.values())
    assert row["rule"].startswith(("'", "\\x"))
    assert row["value"] == "-1.5"  # a number is one


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("result", "test", "drop_interval"), None, "not all of"),
        (("result", "test", "mcnemar_p"), None, "not all of"),
        (("result", "test", "bins_after"), [], "other bins"),
        (("result", "test", "to_wrong", 0, "after"), 10**6, "no name"),
        (("result", "test", "to_wrong", 0, "confidence_after"), None, "lacks the number"),
        (("result", "cost", "latency", 0, "ratio"), None, "lacks the number"),
        (("result", "layers", 1, "ranks"), [-5], "number from 0"),
        (("gates", 0, "limit"), None, "lacks the number"),
        (("baseline",), {"name": "a", "rows": [1], "layers": [], "classes": []}, "baseline"),
    ],
)
def test_reports_that_say_half_are_refused(
    path: tuple[object, ...], value: object, message: str
) -> None:
    report = json.loads(render_json(build_report(report_examples.result())))
    place = report
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(ArtefactError, match=message):
        check_report(report, "it")
