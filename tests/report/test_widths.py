"""Layers that channels were taken out of, as reports, summaries and tables show them."""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import Any

import pytest
import report_examples as examples

from compress.commands.plan import _lines
from compress.commands.summary import run_summary
from compress.plan import Choice, Plan
from compress.report import (
    build_comparison,
    build_report,
    build_sweep_report,
    compare_with_baseline,
    read_report,
    render_csv,
    render_html,
    render_markdown,
    text,
    write_report,
)
from compress.report.plots import plot_data
from compress.result import SplitRecord

NARROW = {"scheme": "narrow", "ranks": (), "width": (24, 48), "break_even": 0}
BOTH = {"scheme": "output", "ranks": (12,), "width": (16, 8), "break_even": 0}


@pytest.fixture(scope="module")
def report() -> Any:
    """A run with a layer only narrowed, one narrowed and factored, and one with ranks alone."""
    first, second, third, *rest = examples.result().layers[1:]
    layers = (
        dataclasses.replace(first, shape="24→96 1x1", **NARROW),
        dataclasses.replace(second, shape="16→16 3x3 s1", full_rank=16, **BOTH),
        third,
        *rest,
    )
    return build_report(examples.result(layers=layers))


@pytest.mark.parametrize(
    ("layer", "shown"),
    [
        ({"ranks": [6], "full_rank": 9, "width": None}, "6 of 9"),
        ({"ranks": [2, 3], "full_rank": 9, "width": None}, f"2 {text.TIMES} 3 of 9"),
        ({"ranks": [], "full_rank": 9, "width": [24, 48]}, "24→48 of 24→96"),
        ({"ranks": [6], "full_rank": 9, "width": [24, 48]}, "6 of 9, 24→48 of 24→96"),
        ({"ranks": [], "full_rank": 9, "width": None}, text.UNKNOWN),
    ],
)
def test_what_is_left_of_a_layer(layer: dict[str, Any], shown: str) -> None:
    assert text.sizes({"shape": "24→96 3x3 s2", **layer}) == shown


def test_the_column_of_ranks_names_widths_only_where_there_are_some(report: Any) -> None:
    assert text.sizes_heading(report["result"]["layers"]) == "rank or width"
    assert text.sizes_heading(report["result"]["layers"][2:]) == "rank"


@pytest.mark.parametrize("form", ["summary", "markdown", "page"])
def test_every_form_of_a_report_shows_widths(report: Any, form: str) -> None:
    shown = {
        "summary": lambda: "\n".join(run_summary(report)),
        "markdown": lambda: render_markdown(report),
        "page": lambda: render_html(report),
    }[form]()
    assert "24→48 of 24→96" in shown
    assert "12 of 16, 16→8 of 16→16" in shown
    assert "rank or width" in shown.lower()
    assert "2 of them with fewer channels" in shown


def test_plots_take_a_narrowed_layer_as_rewritten_but_without_a_rank(report: Any) -> None:
    narrow, both, *_ = plot_data(report)["layers"]
    assert narrow["rewritten"]
    assert (narrow["rank_share"], narrow["break_even_share"]) == (None, None)
    assert narrow["width"] == "24→48"
    assert narrow["predicted"] is not None
    assert both["rank_share"] == 12 / 16
    cuts = {s["name"]: s["cut"] for s in plot_data(report)["spectra"]}
    assert cuts[narrow["name"]] is None


def test_a_width_survives_the_file(report: Any, tmp_path: Any) -> None:
    write_report(report, tmp_path)
    layers = read_report(tmp_path)["result"]["layers"]
    assert [layer["width"] for layer in layers[:3]] == [[24, 48], [16, 8], None]


def test_a_baseline_lists_layers_of_another_width(report: Any) -> None:
    first, *rest = report["result"]["layers"]
    other = {
        **report,
        "result": {**report["result"], "layers": [{**first, "width": [24, 60]}, *rest]},
    }
    compared = compare_with_baseline(report, other)
    (changed,) = compared["baseline"]["layers"]
    assert (changed["width_before"], changed["width_now"]) == ([24, 60], [24, 48])
    for shown in (render_markdown(compared), render_html(compared)):
        assert "narrow 24→60" in shown
        assert "narrow 24→48" in shown


def swept() -> Any:
    """A sweep whose first point has ranks alone, and whose second takes channels out."""
    plain, other, *rest = examples.sweep().points
    name, both, *_ = plain.ranks
    narrow = dataclasses.replace(
        other,
        ranks=other.ranks | {name: ()},
        schemes=other.schemes | {name: "narrow"},
        widths={name: (24, 48), both: (48, 24)},
    )
    return build_sweep_report(dataclasses.replace(examples.sweep(), points=(plain, narrow, *rest)))


def test_tables_of_sweeps_show_widths_beside_ranks() -> None:
    report = swept()
    name, both = list(report["sweep"]["points"][1]["widths"])
    for shown in (render_markdown(report), render_html(report)):
        assert "narrow 24→48" in shown
        assert ", 48→24" in shown
    rows = list(csv.DictReader(io.StringIO(render_csv(report))))
    assert (rows[1][f"rank {name}"], rows[1][f"width {name}"]) == ("narrow", "24x48")
    assert rows[1][f"width {both}"] == "48x24"
    assert rows[1][f"rank {both}"].isdecimal()
    assert (rows[0][f"rank {name}"].isdecimal(), rows[0][f"width {name}"]) == (True, "")
    assert [c for c in rows[0] if c.startswith("width ")] == [f"width {name}", f"width {both}"]


def test_runs_side_by_side_show_widths(report: Any) -> None:
    shown = render_markdown(build_comparison([report, build_report(examples.result())], ["a", "b"]))
    assert "narrow 24→48" in shown
    assert "output 12, 16→8" in shown


def test_a_plan_shows_the_widths_of_what_it_narrows() -> None:
    choice = Choice(
        "expand", "Conv2d", "24→96 1x1", "narrow", (), "best within macs 0.5", 1152, 1200, 2304,
        2400, 0, 24, width=(24, 48),
    )  # fmt: skip
    lines = _lines(Plan("macs", 0.5, "loss", (choice,)))
    assert "rank or width" in lines[0]
    assert "24→48 of 24→96" in lines[2]


@pytest.mark.parametrize(
    ("path", "reason", "said"),
    [
        ("graph", "", "Refitted along the graph, layer by layer and then jointly: new"),
        ("graph", "the joint refit was taken back, since x", "jointly; the joint refit was taken"),
        ("modules", "the network has no graph", "only, since the network has no graph: new"),
    ],
)
def test_a_refit_that_was_taken_back_is_said(path: str, reason: str, said: str) -> None:
    report = build_report(examples.result(refit_path=path, refit_reason=reason))
    assert said in "\n".join(run_summary(report))


def test_images_that_only_the_joint_refit_learned_from_are_said() -> None:
    split = SplitRecord(seed=0, fit_images=750, validation_images=250, further_images=4500)
    report = build_report(examples.result(refit_path="graph", split=split))
    assert "and then jointly with 4,500 further images: new weights" in "\n".join(
        run_summary(report)
    )
    del report["result"]["split"]["further_images"]  # as older reports
    assert "and then jointly: new weights" in "\n".join(run_summary(report))
