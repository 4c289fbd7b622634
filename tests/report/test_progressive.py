"""The curve over layers in every form of a report."""

from __future__ import annotations

from typing import Any

import pytest
import report_examples as examples

from compress.commands.summary import run_summary
from compress.report import build_report, read_report, render_html, render_markdown, write_report
from compress.report.plots import plot_data
from compress.report.progressive import curve_rows, curve_sentence
from compress.result import Progressive, ProgressivePoint


def report_of(curve: Progressive | None) -> Any:
    return build_report(examples.result(progressive=curve))


def points(*values: float | None) -> tuple[ProgressivePoint, ...]:
    return tuple(ProgressivePoint(f"l{i}" if i else "", v) for i, v in enumerate(values))


def test_rows_say_what_each_layer_takes_and_all_so_far() -> None:
    curve = Progressive("accuracy", "fraction", False, "test", 200, points(0.9, 0.89, 0.9, 0.8))
    rows = curve_rows(report_of(curve))
    assert [row["layer"] for row in rows] == ["none", "l1", "l2", "l3"]
    assert rows[0]["change"] is rows[0]["total"] is None
    assert [row["change"] for row in rows[1:]] == pytest.approx([-1.0, 1.0, -10.0])
    assert [row["total"] for row in rows[1:]] == pytest.approx([-1.0, 0.0, -10.0])


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        (
            Progressive("accuracy", "fraction", False, "test", 200, points(0.9, 0.85, 0.8)),
            "Replacing layer by layer takes accuracy from 90.00% to 80.00% on 200 test images; "
            "most is lost with l1 (\u22125.00 points).",
        ),
        (
            Progressive("PSNR", "dB", False, "validation", 1, points(30.0, 29.75, 29.0)),
            "Replacing layer by layer takes PSNR from 30 dB to 29 dB on 1 validation image; most "
            "is lost with l2 (\u22120.75 dB).",
        ),
        (
            Progressive("error", "", True, "test", 200, points(0.0, 0.25, 0.375)),
            "Replacing layer by layer takes error from 0 to 0.375 on 200 test images; most is lost "
            "with l1 (+0.2500).",
        ),
        (
            Progressive("accuracy", "fraction", False, "test", 200, points(0.8, 0.8, 0.85)),
            "Replacing layer by layer takes accuracy from 80.00% to 85.00% on 200 test images, and "
            "no layer takes any away.",
        ),
        (Progressive("F", "", False, "test", 2, points(None, None)), ""),
        (None, ""),
    ],
)
def test_the_sentence_names_the_layer_that_costs_most(curve: Progressive | None, said: str) -> None:
    report = report_of(curve)
    assert curve_sentence(report) == said
    summary = run_summary(report)
    assert [line for line in summary if line.startswith("Replacing")] == ([said] if said else [])


def test_every_form_shows_the_curve(tmp_path: Any) -> None:
    report = build_report(examples.result())
    curve = report["result"]["progressive"]
    worst = curve["points"][5]["layer"]
    assert f"most is lost with {worst} (\u22125.10 points)" in render_markdown(report)
    page = render_html(report)
    assert 'id="plot-progressive"' in page
    assert page.count('href="#progressive"') == 1
    drawn = plot_data(report)["progressive"]
    assert [row["layer"] for row in drawn["rows"][1:]] == [p["layer"] for p in curve["points"][1:]]
    assert drawn["rows"][0]["value"] == pytest.approx(90.0)
    assert drawn["unit"] == "points"
    write_report(report, tmp_path)
    assert read_report(tmp_path)["result"]["progressive"] == curve


def test_without_a_curve_nothing_speaks_of_one() -> None:
    report = report_of(None)
    assert plot_data(report)["progressive"] is None
    for form in (render_markdown(report), render_html(report)):
        assert "ayer by layer" not in form.replace("Refitted along the graph, layer by layer", "")


def test_a_measure_that_is_undefined_somewhere_leaves_a_gap() -> None:
    curve = Progressive("F", "", False, "test", 9, points(0.5, None, 0.25))
    report = report_of(curve)
    rows = curve_rows(report)
    assert [row["change"] for row in rows] == [None, None, None]
    assert rows[2]["total"] == -0.25
    assert [row["index"] for row in plot_data(report)["progressive"]["rows"]] == [0, 2]
    assert "| l1 | \u2013 | \u2013 | \u2013 |" in render_markdown(report)


def test_a_network_that_is_one_layer_is_named_so() -> None:
    curve = Progressive(
        "accuracy", "fraction", False, "test", 9, (*points(0.5), ProgressivePoint("", 0.25))
    )
    assert curve_rows(report_of(curve))[1]["layer"] == "(the model itself)"
