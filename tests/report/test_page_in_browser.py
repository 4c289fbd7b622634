"""The page in a real browser: it opens cleanly, its plots answer, its numbers are the report's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import report_examples as examples

from compress.report import (
    build_comparison,
    build_report,
    build_sweep_report,
    check_gates,
    compare_with_baseline,
    render_html,
    with_gates,
)
from compress.report.page import Pictures
from compress.report.points import points
from compress.result import Deployed

RUN_PLOTS = (
    "plot-drop", "plot-classes", "plot-calibration", "plot-macs", "plot-ranks", "plot-errors",
    "plot-spectra", "plot-loss", "plot-latency", "plot-progressive",
    "plot-recovery",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    result = examples.result(recovery=examples.recovery())
    report = build_report(result)
    report = with_gates(report, check_gates(report, {"max_drop": 0.5, "max_class_drop": 50.0}))
    baseline = build_report(examples.result(test=examples.metric(noise=0.8)))
    report = compare_with_baseline(report, baseline, name="v1/report.json")
    page = tmp_path_factory.mktemp("run") / "report.html"
    page.write_text(
        render_html(report, Pictures(examples.thumbnails(result.test))), encoding="utf-8"
    )
    return report, page


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Any:
    report = build_sweep_report(examples.sweep())
    page = tmp_path_factory.mktemp("sweep") / "report.html"
    page.write_text(render_html(report), encoding="utf-8")
    return report, page


def hover(browser: Any, figure: Any, mark: Any, number: Any) -> Any:
    """Move the mouse over the middle of the numbered mark and return the tip's text."""
    x, y = browser.evaluate(
        f"(() => {{ const m = document.querySelectorAll('#{figure} {mark}')[{number}];"
        "m.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const r = m.getBoundingClientRect();"
        "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    browser.mouse(x, y)
    return x, y, tip(browser, figure)


def tip(browser: Any, figure: Any) -> Any:
    return browser.evaluate(
        "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done("
        f"document.querySelector('#{figure} [aria-label=tip]').textContent))))"
    )


@pytest.mark.parametrize(
    ("width", "scheme"), [(1200, "light"), (1200, "dark"), (390, "light"), (320, "dark")]
)
def test_a_run_opens_cleanly_with_every_plot(
    browser: Any, run: Any, width: Any, scheme: Any
) -> None:
    _, page = run
    browser.open(page, width=width, scheme=scheme)
    assert browser.complaints == []
    assert browser.requests == [page.as_uri()]
    for plot in RUN_PLOTS:
        assert browser.evaluate(f"document.querySelectorAll('#{plot} svg').length") == 1, plot
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("window.attacked") is None
    brightness = browser.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    )
    assert (brightness < 60) == (scheme == "dark")


def test_the_numbers_are_the_reports(browser: Any, run: Any) -> None:
    report, page = run
    browser.open(page)
    metric = report["result"]["test"]
    assert browser.evaluate("document.querySelector('.tile .big').textContent") == (
        f"{100 * metric['top1_after']:.2f}%"
    )
    ratios = browser.evaluate("[...document.querySelectorAll('.tile .big')].map(e => e.innerText)")
    head = report["headline"]
    assert ratios[1:] == [
        f"×{head[key]:.2f}"  # noqa: RUF001 - the sign the page uses
        for key in ("macs_ratio", "params_ratio", "bytes_ratio", "latency_ratio")
    ]
    drawn = json.loads(browser.evaluate("document.getElementById('data').textContent"))
    layers = report["result"]["layers"]
    assert [d["macs"] for d in drawn["layers"]] == [x["macs"] for x in layers]
    assert [d["name"] for d in drawn["layers"]] == [x["name"] for x in layers]
    worst = min(metric["per_class"], key=lambda row: row["change"])
    assert drawn["classes"][0]["name"] == worst["name"]
    rows = browser.evaluate(
        "[...document.querySelectorAll('#plot-classes tbody tr')].map(r => r.innerText)"
    )
    assert len(rows) == len(metric["per_class"])
    assert (
        browser.evaluate("document.querySelector('#plot-classes tbody th').textContent")
        == (worst["name"])
    )
    bars = "#plot-macs g[aria-label=bar]"
    assert browser.evaluate(f"document.querySelectorAll('{bars} rect').length") == 2 * len(layers)


def test_classes_named_with_html_stay_text(browser: Any, run: Any) -> None:
    _, page = run
    browser.open(page)
    assert browser.evaluate("document.querySelectorAll('img[src=x], main b').length") == 0
    assert examples.ATTACK in browser.evaluate("document.getElementById('accuracy').textContent")
    # Even markup that got in would not run: the policy names the page's own scripts alone.
    browser.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=hit()>')")
    browser.evaluate("new Promise(done => setTimeout(done, 100))")
    assert any("Content Security Policy" in line for line in browser.complaints)


def test_hovering_shows_layer_and_value(browser: Any, run: Any) -> None:
    report, page = run
    browser.open(page)
    layer = report["result"]["layers"][5]
    _, _, shown = hover(browser, "plot-macs", "g[aria-label=bar] rect", 5)
    assert layer["name"] in shown
    assert f"{layer['macs'] / 1e6:.3g} M" in shown
    rewritten = [x for x in report["result"]["layers"] if x["scheme"] != "dense"]
    _, _, shown = hover(browser, "plot-ranks", "g[aria-label=dot] circle", 2)
    assert rewritten[2]["name"] in shown
    assert f"of {rewritten[2]['full_rank']}" in shown


def test_the_arrow_keys_read_a_plot(browser: Any, run: Any) -> None:
    report, page = run
    browser.open(page)
    browser.evaluate("document.querySelector('#plot-ranks .canvas').focus()")
    browser.key("ArrowRight")
    browser.key("ArrowRight")
    rewritten = [x for x in report["result"]["layers"] if x["scheme"] != "dense"]
    spoken = browser.evaluate("document.querySelector('#plot-ranks .readout').textContent")
    assert spoken.startswith(rewritten[1]["name"])
    assert rewritten[1]["name"] in tip(browser, "plot-ranks")
    browser.key("End")
    spoken = browser.evaluate("document.querySelector('#plot-ranks .readout').textContent")
    assert spoken.startswith(rewritten[-1]["name"])


def test_choosing_a_spectrum_brings_it_forward(browser: Any, run: Any) -> None:
    report, page = run
    browser.open(page)
    name = report["result"]["layers"][3]["name"]
    count = "document.querySelectorAll('#plot-spectra g[aria-label=line] path').length"
    before = browser.evaluate(count)
    browser.evaluate(
        "(() => { const s = document.getElementById('choose-spectrum');"
        f"s.value = {json.dumps(name)}; s.dispatchEvent(new Event('change')); }})()"
    )
    assert browser.evaluate(count) == before + 1
    assert browser.complaints == []


def test_everything_has_a_name_for_a_screen_reader(browser: Any, run: Any, sweep: Any) -> None:
    for _, page in (run, sweep):
        browser.open(page)
        assert browser.evaluate("document.documentElement.lang") == "en"
        assert browser.evaluate("document.querySelectorAll('h1').length") == 1
        assert browser.evaluate("[...document.images].every(i => i.alt)")
        nameless = browser.evaluate(
            "[...document.querySelectorAll('.canvas, .scroll, table, select, button')].filter(e =>"
            "!(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).length"
        )
        assert nameless == 0
        assert browser.evaluate(
            "[...document.querySelectorAll('.canvas, .scroll')].every(e => e.tabIndex === 0)"
        )
        assert browser.evaluate(
            "new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size"
            " === document.querySelectorAll('[id]').length"
        )


def test_plots_are_drawn_again_for_a_new_width(browser: Any, run: Any) -> None:
    _, page = run
    browser.open(page, width=1200)
    wide = browser.evaluate("document.querySelector('#plot-macs svg').clientWidth")
    browser.call(
        "Emulation.setDeviceMetricsOverride",
        width=400, height=800, deviceScaleFactor=1, mobile=False,
    )  # fmt: skip
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    narrow = browser.evaluate("document.querySelector('#plot-macs svg').clientWidth")
    assert narrow < 400 < wide
    assert browser.evaluate("document.documentElement.scrollWidth") == 400


def test_clicking_a_sweep_point_shows_its_ranks(browser: Any, sweep: Any) -> None:
    report, page = sweep
    browser.open(page)
    assert browser.complaints == []
    chosen = "document.getElementById('chosen').innerText"
    rows = points(report)
    assert rows[3]["label"] in browser.evaluate(chosen)
    x, y, shown = hover(browser, "plot-points", "g[aria-label=dot] circle", 5)
    drawn = next(row for row in rows if row["label"] in shown)
    browser.mouse(x, y, click=True)
    panel = browser.evaluate(chosen)
    assert panel.startswith(drawn["label"])
    for name, ranks in drawn["ranks"].items():
        assert name in panel
        assert f"output {ranks[0]}" in panel
    browser.evaluate("document.querySelector('#plot-points .canvas').focus()")
    browser.key("ArrowRight")
    browser.key("Enter")
    assert browser.evaluate(chosen).startswith(rows[0]["label"])
    browser.evaluate("document.querySelector('button[data-point=\"6\"]').click()")
    assert browser.evaluate(chosen).startswith(rows[6]["label"])


def test_a_sweep_shows_the_test_images_instead_where_every_point_met_them(
    browser: Any, tmp_path: Path, sweep: Any
) -> None:
    _, page = sweep
    browser.open(page)
    assert not browser.evaluate("!!document.getElementById('choose-set')")
    made = examples.sweep()
    tested = [
        dataclasses.replace(p, test=examples.metric(300, noise=0.1 + 0.3 * i, seed=6))
        for i, p in enumerate(made.points)
    ]
    report = build_sweep_report(dataclasses.replace(made, points=tuple(tested)))
    page = tmp_path / "report.html"
    page.write_text(render_html(report), encoding="utf-8")
    browser.open(page)
    rows = points(report)
    _, _, shown = hover(browser, "plot-points", "g[aria-label=dot] circle", 2)
    assert f"{100 * rows[2]['after']:.2f}%" in shown
    browser.evaluate(
        "(() => { const s = document.getElementById('choose-set');"
        " s.value = 'on_test'; s.dispatchEvent(new Event('change')); })()"
    )
    _, _, shown = hover(browser, "plot-points", "g[aria-label=dot] circle", 2)
    assert f"{100 * rows[2]['test_after']:.2f}%" in shown
    panel = browser.evaluate("document.getElementById('chosen').innerText")
    assert f"validation {100 * rows[3]['after']:.2f}%" in panel
    assert f"test {100 * rows[3]['test_after']:.2f}%" in panel
    assert browser.complaints == []


@pytest.mark.parametrize("kind", ["unverified", "custom", "bare", "one-point", "empty", "several"])
def test_thin_reports_open_cleanly_too(browser: Any, tmp_path: Path, kind: Any) -> None:
    report = examples.thin(kind) if kind != "several" else None
    if report is None:
        runs = [build_report(examples.result()), build_report(examples.result())]
        report = build_comparison(runs, ["a", "b"])
    page = tmp_path / "report.html"
    page.write_text(render_html(report), encoding="utf-8")
    browser.open(page, width=700)
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") == 700
    # A plot without data is taken away, not left empty.
    assert browser.evaluate(
        "[...document.querySelectorAll('.plot')].every(f => f.querySelector('svg'))"
    )


@pytest.mark.parametrize("timed", [True, False])
def test_files_in_float_and_in_eight_bits_are_drawn(
    browser: Any, tmp_path: Path, timed: bool
) -> None:
    def files(size: int, ratio: float, seed: int) -> tuple[Deployed, Deployed]:
        found = [examples.metric(300, noise=0.1 + 0.2 * int8, seed=seed) for int8 in (0, 1)]
        time = ratio if timed else None
        return (
            Deployed(False, size, time, time, validation=found[0], by_time=timed),
            Deployed(True, size // 4, time, time, validation=found[1], by_bytes=True),
        )

    made = examples.sweep()
    dense = files(1000, 1.0, 7)
    with_files = [
        dataclasses.replace(p, deployed=files(900 - 50 * i, 0.9 - 0.05 * i, 8 + i))
        for i, p in enumerate(made.points)
    ]
    result = dataclasses.replace(
        made, points=tuple(with_files), deployed=dense, deployed_on="onnxruntime", deployed_batch=8
    )
    page = tmp_path / "report.html"
    page.write_text(render_html(build_sweep_report(result)), encoding="utf-8")
    browser.open(page, width=390)
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
    for plot, drawn in (("plot-files-time", timed), ("plot-files-size", True)):
        marks = f"document.querySelectorAll('#{plot} g[aria-label=dot] path').length"
        assert browser.evaluate(marks) == (2 * (1 + len(made.points)) if drawn else 0)
