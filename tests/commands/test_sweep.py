"""``compress sweep`` as its user meets it: what it prints, writes, refuses, and goes on from."""

from __future__ import annotations

import csv
import json
from typing import Any

import jsonschema
import pytest
from workbench import SPEC, Workbench, command, paragraph

from compress.report.schema import report_schema


def arguments(bench: Workbench, *flags: str, output: str = "sweep") -> list[str]:
    return [
        "sweep", bench.checkpoint, "--model", SPEC, "--data", bench.train, "--test", bench.test,
        "--no-refit", "--output", str(bench.output(output)), *flags,
    ]  # fmt: skip


def sweep(bench: Workbench, *flags: str, output: str = "sweep") -> Any:
    return command(*arguments(bench, *flags, output=output))


def test_it_prints_a_line_a_point_and_writes_table_json_and_report(bench: Workbench) -> None:
    result = sweep(bench, "--thresholds", "1e-2:0.5:3", "--pick", "drop<=100")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["threshold", "0.01"], ["threshold", "0.07071"], ["threshold", "0.5"],
    ]  # fmt: skip
    assert any(line.startswith("Pareto front") for line in lines)
    assert any(line.startswith("Chosen by drop<=100: threshold 0.5") for line in lines)
    folder = bench.output("sweep")
    report = json.loads((folder / "report.json").read_text())
    jsonschema.validate(report, report_schema())
    with open(folder / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    points = report["sweep"]["points"]
    assert [(float(r["value"]), int(r["macs"]), float(r["after"])) for r in rows] == [
        (p["value"], p["macs"], p["validation"]["top1_after"]) for p in points
    ]
    assert [r["chosen"] for r in rows] == ["false", "false", "true"]
    assert "plot-points" in (folder / "report.html").read_text()
    assert (folder / "config.toml").read_text().startswith("# compress sweep --thresholds 0.01,")
    chosen = command("report", str(folder / "chosen"), "--max-macs-ratio", "1")
    assert chosen.exit_code == 0


def test_json_is_the_report_and_quiet_is_quiet(bench: Workbench) -> None:
    result = sweep(bench, "--macs", "0.8,0.5", "--json")
    assert json.loads(result.stdout) == json.loads(
        (bench.output("sweep") / "report.json").read_text()
    )
    assert sweep(bench, "--macs", "0.8", "--quiet", output="other").stdout == ""


def test_it_goes_on_after_a_stop_and_refuses_to_write_over(bench: Workbench) -> None:
    assert sweep(bench, "--params", "0.9,0.6").exit_code == 0
    assert "--resume" in paragraph(sweep(bench, "--params", "0.9,0.6"), 3)
    again = sweep(bench, "--params", "0.9,0.6,0.4", "--resume")
    kept = [line.split()[-1] for line in again.stdout.splitlines()[1:4]]
    assert kept[:2] == ["kept", "kept"]
    assert kept[2] != "kept"
    assert sweep(bench, "--params", "0.6", "--force").exit_code == 0


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ((), 2, "No grid was given"),
        (("--macs", "0.5", "--energies", "0.9"), 2, "Several grids were given"),
        (("--thresholds", ""), 2, "--thresholds is empty"),
        (("--thresholds", "1e-4:1e-1:none"), 2, "not a whole number"),
        (("--macs", "0.5,1.5"), 2, "macs = 1.5 is outside"),
        (("--macs", "0.5", "--pick", "accuracy"), 2, "is not a condition"),
        (("--macs", "0.5", "--pick", "dorp<=1"), 2, "Did you mean 'drop'"),
    ],
)
def test_requests_that_are_none_are_refused_before_any_work(
    bench: Workbench, flags: Any, code: Any, words: Any
) -> None:
    assert words in paragraph(sweep(bench, *flags), code)
    assert not bench.output("sweep").exists()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--macs", "0.5,0.0001"), 2, "smallest reachable"),
        (("--macs", "0.5", "--pick", "drop<=-100"), 1, "No point of the sweep satisfies"),
        (("--macs", "0.5", "--pick", "macs<=1", "--max-layer-relative-mse", "1e-9"), 1,
         "The chosen point was not saved"),
    ],
)  # fmt: skip
def test_sweeps_that_fail_say_why(bench: Workbench, flags: Any, code: Any, words: Any) -> None:
    result = sweep(bench, *flags)
    assert result.exit_code == code
    error = result.stderr.strip()
    assert error.startswith("Error: ")
    assert words in error
    assert "\n" not in error


def test_the_rules_of_a_single_run_are_no_flags_of_a_sweep(bench: Workbench) -> None:
    shown = command("sweep", "--help").stdout
    assert "--thresholds" in shown
    assert "--threshold " not in shown
    assert "--target-drop" not in shown
    assert shown.count("--macs GRID") == 1
    assert "No such option" in sweep(bench, "--energy", "0.9").stderr
