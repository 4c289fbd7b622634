"""What a report shows of a network that learned from its original."""

from __future__ import annotations

import report_examples as examples

from compress.report import build_report, render_html, render_markdown
from compress.report.plots import plot_data


def test_every_form_shows_every_look() -> None:
    found = examples.recovery()
    report = build_report(examples.result(recovery=found))
    drawn = plot_data(report)["recovery"]
    assert [(d["step"], d["distance"]) for d in drawn] == [
        (check.step, check.distance) for check in found.checks
    ]
    assert [d["step"] for d in drawn if d["kept"]] == [found.best_step]
    page = render_html(report)
    assert 'id="plot-recovery"' in page
    assert page.count('href="#recovery"') == 1
    assert "mirrored, shifted and pasted into each other" in page
    assert "What 2 blocks on the way gave was matched too." in page
    assert "Both networks computed in mixed precision." in page
    assert "| 300 | 0.41 (kept) |" in render_markdown(report)
    assert "fell from 0.52 to 0.41, 88.00% on the test images before it." in page


def test_without_one_nothing_speaks_of_it() -> None:
    report = build_report(examples.result())
    assert plot_data(report)["recovery"] == []
    assert "ecover" not in render_markdown(report)
    assert 'id="recovery"' not in render_html(report)
