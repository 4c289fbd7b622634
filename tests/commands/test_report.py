"""``compress report``: finished results, a pair measured anew, limits, baselines, bad input."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from stopwatch import stop_the_clock
from workbench import SPEC, Workbench, command, made_images, paragraph, trained

from compress.commands.group import cli
from compress.commands.report import LIMIT_HELP
from compress.report import LIMITS, build_report, read_report, write_report
from compress.report.schema import report_schema
from compress.result import ClassResult, from_dict
from compress.result.runs import Result


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A workbench with one finished run, which no test changes."""

    with pytest.MonkeyPatch.context() as patch:
        stop_the_clock(patch)
        made = Workbench.make(tmp_path_factory.mktemp("bench"), trained())
        done = made.run("--macs", "0.6", "--no-refit")
        assert done.exit_code == 0, done.stderr
        yield made


@pytest.fixture
def result(bench: Workbench) -> Any:
    """The result folder of the tiny network."""
    return bench.output()


def changed(folder: Path, target: Path, **changes: Any) -> Path:
    """Write a report like that of ``folder``, some of its result changed."""
    found = from_dict(Result, read_report(folder)["result"])
    target.mkdir()
    write_report(build_report(dataclasses.replace(found, **changes)), target)
    return target


def test_every_limit_has_its_flag() -> None:
    assert list(LIMIT_HELP) == list(LIMITS)
    shown = command("report", "--help").stdout
    for name in LIMITS:
        assert "--" + name.replace("_", "-") in shown


@pytest.mark.parametrize("which", ["folder", "model.safetensors", "report.json"])
def test_a_result_is_a_folder_or_a_file_of_it(result: Any, which: Any) -> None:
    given = result if which == "folder" else result / which
    done = command("report", str(given))
    assert done.exit_code == 0
    assert "Verified, no limits set" in done.stdout
    assert json.loads(command("report", str(given), "--json").stdout) == read_report(result)
    assert command("report", str(given), "--quiet").stdout == ""


def test_limits_gate_with_exit_code_one_and_say_by_how_much(result: Any, tmp_path: Path) -> None:
    metric = read_report(result)["result"]["test"]
    limit = metric["drop"] - 1.25
    worst = -min(c["change"] for c in metric["per_class"]) - 0.5
    junit = tmp_path / "junit.xml"
    done = command(
        "report", str(result), "--max-drop", str(limit), "--max-class-drop", str(worst),
        "--max-macs-ratio", "0.9", "--junit", str(junit), "--output", str(tmp_path / "kept"),
    )  # fmt: skip
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: drop of accuracy is")
    assert "broken by 1.25 points" in done.stderr
    assert "broken by 0.50 points" in done.stderr
    assert "MACs ratio" not in done.stderr
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("4", "2")
    kept = read_report(tmp_path / "kept")
    jsonschema.validate(kept, report_schema())
    assert (kept["verdict"], len(kept["gates"])) == ("failed", 3)
    assert {p.name for p in (tmp_path / "kept").iterdir()} == {
        "report.json", "report.md", "report.html",
    }  # fmt: skip


def test_limits_that_hold_pass(result: Any) -> None:
    ratio = read_report(result)["headline"]["params_ratio"]
    done = command("report", str(result), "--max-drop", "100", "--max-params-ratio", str(ratio))
    assert done.exit_code == 0
    assert "Passed: 2 limits kept" in done.stdout


def test_limits_may_stand_in_the_configuration_and_replace_the_runs_own(
    bench: Workbench, tmp_path: Path
) -> None:
    output = str(tmp_path / "limited")
    done = bench.run("--macs", "0.6", "--no-refit", "--max-drop", "100", output=output)
    assert done.exit_code == 0
    file = tmp_path / "limits.toml"
    file.write_text("max_drop = 90.0\nmin_agreement = 0.01\n")
    done = command("report", output, "--config", str(file), "--json")
    gates = {g["name"]: g["limit"] for g in json.loads(done.stdout)["gates"]}
    assert gates == {"max_drop": 90.0, "min_agreement": 0.01}


def test_a_result_without_a_test_set_keeps_no_limit_on_accuracy(
    bench: Workbench, tmp_path: Path
) -> None:
    output = str(tmp_path / "untested")
    assert bench.run("--macs", "0.6", "--no-refit", test=None, output=output).exit_code == 0
    done = command("report", output, "--max-drop", "100")
    assert done.exit_code == 1
    assert "not measured (no test set)" in done.stderr


def test_a_pair_measured_anew_says_what_the_run_said(
    bench: Workbench, result: Any, tmp_path: Path
) -> None:
    done = command(
        "report", "--before", bench.checkpoint, "--model", SPEC, "--after", str(result),
        "--test", bench.test, "--output", str(tmp_path / "again"), "--max-drop", "100",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    before, again = read_report(result), read_report(tmp_path / "again")
    assert again["result"]["test"] == before["result"]["test"]
    assert again["result"]["cost"]["compressed"] == before["result"]["cost"]["compressed"]
    treatments = [
        [(x["name"], x["scheme"], x["ranks"], x["macs"]) for x in r["result"]["layers"]]
        for r in (before, again)
    ]
    assert treatments[0] == treatments[1]
    flips = before["result"]["test"]["to_wrong"] + before["result"]["test"]["to_right"]
    html = (tmp_path / "again" / "report.html").read_text()
    assert html.count("data:image/png;base64,") == len(flips)


def test_several_results_stand_side_by_side(bench: Workbench, result: Any, tmp_path: Path) -> None:
    assert bench.run("--macs", "0.8", "--no-refit", output=str(tmp_path / "b")).exit_code == 0
    done = command(
        "report", str(result), str(tmp_path / "b"), "--output", str(tmp_path / "both"),
        "--max-macs-ratio", "0.7", "--junit", str(tmp_path / "both.xml"),
    )  # fmt: skip
    assert done.exit_code == 1
    assert f"{tmp_path / 'b'}: MACs ratio" in done.stderr
    both = read_report(tmp_path / "both")
    jsonschema.validate(both, report_schema())
    assert [run["verdict"] for run in both["runs"]] == ["passed", "failed"]
    assert len(ElementTree.parse(tmp_path / "both.xml").getroot()) == 2


def test_a_baseline_shows_and_limits_regressions(result: Any, tmp_path: Path) -> None:
    test = from_dict(Result, read_report(result)["result"]).test
    assert test is not None
    assert test.top1_after is not None
    better = dataclasses.replace(test, top1_after=test.top1_after + 0.04)
    earlier = changed(result, tmp_path / "earlier", test=better)
    line = ["report", str(result), "--baseline", str(earlier / "report.json")]
    assert command(*line, "--max-regression", "4.5").exit_code == 0
    done = command(*line, "--max-regression", "1")
    assert done.exit_code == 1
    assert "loss of accuracy since the baseline is 4.00 points" in done.stderr
    assert "broken by 3.00 points" in done.stderr
    assert f"since {earlier / 'report.json'}" in done.stdout
    missing = command("report", str(result), "--max-regression", "1")
    assert "no baseline report was given" in missing.stderr


# --- Bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_fingerprint": "00" * 32}, "different models"),
        ({"test_fingerprint": "00" * 32}, "different images or labels"),
        ({"test": None}, "has no test set"),
    ],
)
@pytest.mark.parametrize("how", ["several", "baseline"])
def test_results_that_say_nothing_about_each_other(
    result: Any, tmp_path: Path, change: Any, words: Any, how: Any
) -> None:
    other = changed(result, tmp_path / "other", **change)
    pair = (
        [str(result), str(other)] if how == "several" else [str(result), "--baseline", str(other)]
    )
    said = paragraph(command("report", *pair), 2)
    assert words in said
    assert "--allow-mismatch" in said
    line = ["report", *pair, "--allow-mismatch", "--output", str(tmp_path / "banner")]
    done = command(*line)
    assert done.exit_code == 0
    assert f"Warning: {said.removeprefix('Error: ').split('. ')[0][:20]}" in done.stdout
    assert 'class="banner"' in (tmp_path / "banner" / "report.html").read_text()


def test_test_sets_of_different_length_are_refused(
    bench: Workbench, result: Any, tmp_path: Path
) -> None:
    images, labels = made_images(18, seed=5)
    np.savez(tmp_path / "short.npz", images=images, labels=labels)
    short = bench.run(
        "--macs", "0.6", "--no-refit", output=str(tmp_path / "short"),
        test=f"tensors:{tmp_path / 'short.npz'}",
    )  # fmt: skip
    assert short.exit_code == 0
    said = paragraph(command("report", str(result), str(tmp_path / "short")), 2)
    assert "24 images" in said
    assert "18" in said


def test_a_class_that_is_missing_from_the_test_set_is_shown_as_that(
    bench: Workbench, result: Any, tmp_path: Path
) -> None:
    images, labels = made_images(24, seed=5)
    np.savez(tmp_path / "two.npz", images=images[labels != 1], labels=labels[labels != 1])
    done = command(
        "report", "--before", bench.checkpoint, "--model", SPEC, "--after", str(result),
        "--test", f"tensors:{tmp_path / 'two.npz'}", "--output", str(tmp_path / "two"),
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    rows = read_report(tmp_path / "two")["result"]["test"]["per_class"]
    assert rows[1] == dataclasses.asdict(ClassResult("1", 0))
    assert "no image in this set" in (tmp_path / "two" / "report.html").read_text()


def test_class_names_with_html_do_not_run(result: Any, tmp_path: Path) -> None:
    test = from_dict(Result, read_report(result)["result"]).test
    attack = "</script><img src=x onerror=alert(1)>"
    classes = (attack, *test.classes[1:])
    rows = tuple(
        dataclasses.replace(row, name=name)
        for row, name in zip(test.per_class, classes, strict=True)
    )
    assert test is not None
    evil = changed(
        result, tmp_path / "evil", test=dataclasses.replace(test, classes=classes, per_class=rows)
    )
    done = command("report", str(evil), "--output", str(tmp_path / "page"))
    assert done.exit_code == 0
    for name in ("report.html", "report.md"):
        assert "<img src=x" not in (tmp_path / "page" / name).read_text()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "may be truncated"),
        (lambda text: text.replace('"format": 1', '"format": 2', 1), "update compress"),
        (lambda _: "[]", "is not a report of compress"),
        (lambda text: text.replace('"verdict"', '"verdikt"', 1), "lacks verdict"),
    ],
)
@pytest.mark.parametrize("as_baseline", [False, True])
def test_reports_that_cannot_be_read(
    result: Any, tmp_path: Path, damage: Any, words: Any, as_baseline: Any
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(result, bad)
    (bad / "report.json").write_text(damage((result / "report.json").read_text()))
    line = [str(result), "--baseline", str(bad)] if as_baseline else [str(bad)]
    assert words in paragraph(command("report", *line), 3)


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ((), 2, "Nothing to report on"),
        (("--before", "a.pt"), 2, "--after is missing"),
        (("--after", "b"), 2, "--before is missing"),
        (("RESULT", "--before", "a.pt", "--after", "b"), 2, "not both"),
        (("RESULT", "RESULT", "--baseline", "RESULT"), 2, "--baseline compares one"),
        (("none",), 3, "There is no report at"),
        (("RESULT", "--output", "RESULT"), 3, "already holds a report"),
        (("RESULT", "--baseline", "none"), 3, "There is no report at"),
        (("RESULT", "--junit", "no/such/folder/j.xml"), 3, "cannot be written"),
        (("--before", "none.pt", "--after", "RESULT", "--test", "TEST", "--model", "MODEL"), 3,
         "none.pt"),
        (("--before", "CHECKPOINT", "--after", "none", "--test", "TEST"), 3, "none"),
        (("--before", "CHECKPOINT", "--after", "RESULT", "--model", "MODEL"), 2, "--test"),
        (("--before", "CHECKPOINT", "--after", "RESULT", "--test", "TEST"), 3, "--trust-code"),
    ],
)  # fmt: skip
def test_requests_that_are_none(
    bench: Workbench, result: Any, line: Any, code: Any, words: Any
) -> None:
    names = {
        "RESULT": str(result), "CHECKPOINT": bench.checkpoint, "TEST": bench.test, "MODEL": SPEC,
    }  # fmt: skip
    assert words in paragraph(command("report", *(names.get(part, part) for part in line)), code)


def test_a_limit_that_is_no_number_is_a_usage_error(result: Any) -> None:
    done = CliRunner().invoke(cli, ["report", str(result), "--max-drop", "half"])
    assert done.exit_code == 2
    assert "'half' is not a valid float" in done.stderr


def test_a_sweep_is_shown_and_its_chosen_point_can_be_held_to_limits(
    bench: Workbench, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    swept = command(
        "sweep", bench.checkpoint, "--model", SPEC, "--data", bench.train, "--test", bench.test,
        "--no-refit", "--output", str(folder), "--macs", "0.9,0.5", "--pick", "macs<=1",
    )  # fmt: skip
    assert swept.exit_code == 0, swept.stderr
    done = command("report", str(folder))
    assert done.exit_code == 0
    assert "macs 0.9" in done.stdout
    for flags in (("--max-drop", "1"), ("--baseline", str(folder)), ("--junit", "j.xml")):
        assert "chosen" in paragraph(command("report", str(folder), *flags), 2)
    assert command("report", str(folder / "chosen"), "--max-macs-ratio", "0.5").exit_code == 0


def test_a_report_is_written_whole_or_not_at_all(
    result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "report.html":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        real(source, target)

    monkeypatch.setattr("os.replace", full)
    new = tmp_path / "deep" / "new"
    text = paragraph(command("report", str(result), "--output", str(new)), 3)
    assert "No space left on device" in text
    assert list(tmp_path.iterdir()) == []


def test_junit_replaces_nothing_but_junit(result: Any, tmp_path: Path) -> None:
    model = shutil.copy(result / "model.safetensors", tmp_path / "model.safetensors")
    given = ("report", str(result), "--max-macs-ratio", "1", "--junit")
    text = paragraph(command(*given, str(model)), 3)
    assert "was not written by compress report" in text
    assert Path(model).read_bytes() == (result / "model.safetensors").read_bytes()
    for _ in range(2):
        assert command(*given, str(tmp_path / "junit.xml")).exit_code == 0
