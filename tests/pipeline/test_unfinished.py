"""What a run whose later stages fail leaves behind, and that the work goes on from there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stopwatch import stop_the_clock
from workbench import SPEC, Workbench, command, made_images, paragraph, trained

import compress
from compress.artefact.manifest import read_manifest
from compress.config import make_config, read_toml
from compress.errors import ArtefactError, DataError
from compress.pipeline.places import check_places
from compress.pipeline.run import compress_model

RANKS = ("--rank", "conv1=3", "--rank", "conv2=4")
WHOLE = [
    "calibration.safetensors", "config.toml", "model.safetensors", "plan.json", "runtime.json",
]  # fmt: skip


def failing(patch: pytest.MonkeyPatch, place: str, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    patch.setattr(f"compress.pipeline.{place}", fail)


def names(bench: Workbench) -> list[str]:
    folder = bench.output("out.unfinished")
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


LATE: list[tuple[str, Exception, int]] = [
    ("run.costs", RuntimeError("out of memory"), 70),
    ("run.assess", DataError("The image 7 cannot be read."), 3),
    ("folder.check_reload", ArtefactError("The saved model differs."), 3),
    ("folder.write_report", ArtefactError("The report cannot be written."), 3),
]


@pytest.mark.parametrize(("place", "error", "code"), LATE, ids=[place for place, *_ in LATE])
def test_a_late_failure_leaves_the_work_and_the_commands_that_go_on(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception, code: int
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, place, error)
        text = paragraph(bench.run(*RANKS), code)
    assert str(error).rstrip(".") in text
    folder = bench.output("out.unfinished")
    assert f"is kept in {folder}: the calibration, the plan and the fitted model" in text
    assert names(bench) == WHOLE
    assert bench.leftovers() == ["out.unfinished"]
    assert read_manifest(folder).verified == {}

    # An undisturbed run makes the same model.
    whole = bench.run(*RANKS, output=str(bench.output("whole")))
    assert whole.exit_code == 0, whole.stderr
    expected = load_file(bench.output("whole") / "model.safetensors")
    kept = load_file(folder / "model.safetensors")
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[n], expected[n]) for n in kept)
    inputs = torch.tensor(made_images(4)[0]).unsqueeze(1).float() / 255
    with torch.no_grad():
        models = [compress.load(bench.output(n), trust_code=True) for n in (folder.name, "whole")]
        assert torch.equal(models[0](inputs), models[1](inputs))

    # The commands in the message do what they say, and calibrate nothing anew.
    ways = re.findall("`compress ([^`]+)`", text)
    assert [way.split()[0] for way in ways] == ["verify", "apply"]
    failing(monkeypatch, "job.calibrate", AssertionError("calibrated again"))
    for way in ways:
        done = command(*shlex.split(way), "--trust-code")
        assert done.exit_code == 0, done.stderr
    again = load_file(bench.output() / "model.safetensors")
    assert all(torch.equal(again[n], expected[n]) for n in expected)


def test_a_model_that_lies_in_another_memory_format_is_kept_too(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_the_clock(monkeypatch, compressed=0.01, compressed_channels_last=0.002)
    failing(monkeypatch, "folder.write_report", ArtefactError("no."))
    assert bench.run(*RANKS).exit_code == 3
    assert names(bench) == WHOLE
    runtime = json.loads((bench.output("out.unfinished") / "runtime.json").read_text())
    assert runtime["memory_format"] == "channels_last"


def test_statistics_in_a_file_of_the_users_are_not_written_twice(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = str(bench.folder / "own.safetensors")
    failing(monkeypatch, "run.assess", DataError("no."))
    text = paragraph(bench.run(*RANKS, "--calibration", own), 3)
    assert "the plan and the fitted model" in text
    assert names(bench) == [n for n in WHOLE if n != "calibration.safetensors"]
    config = make_config(read_toml(bench.output("out.unfinished") / "config.toml"))
    assert config.calibration == own


def test_statistics_that_take_much_memory_are_given_up(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.pipeline.unfinished.LARGEST_HELD", 1000)
    failing(monkeypatch, "run.assess", DataError("no."))
    assert bench.run(*RANKS).exit_code == 3
    assert names(bench) == [n for n in WHOLE if n != "calibration.safetensors"]
    assert read_toml(bench.output("out.unfinished") / "config.toml")["calibration"] == ""


def test_what_cannot_be_written_does_not_keep_all_else_from_it(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "run.assess", DataError("no."))
    failing(monkeypatch, "unfinished.write_calibration", ArtefactError("no room."))
    failing(monkeypatch, "unfinished.check_reload", ArtefactError("not the same."))
    assert "is kept in" in paragraph(bench.run(*RANKS), 3)
    assert names(bench) == ["config.toml", "plan.json"]


@pytest.mark.parametrize("stage", ["plan", "fit"])
def test_a_choice_or_a_fit_that_fails_keeps_what_took_long(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    rule = ("--macs", "0.8")
    if stage == "fit":
        # A budget fits as well what it chooses from; here only the fit at the end is to fail.
        monkeypatch.setattr("compress.pipeline.promised.ROUNDS", 0)
        monkeypatch.setattr("compress.pipeline.run.Job.fitter", property(lambda _: 1 / 0))
    else:
        rule = ("--macs", "0.0001")
    code = {"plan": 2, "fit": 70}[stage]
    assert "kept" not in paragraph(bench.run(*rule), code)
    assert bench.leftovers() == []
    monkeypatch.setattr("compress.pipeline.unfinished.WORTH_KEEPING", 0.0)
    text = paragraph(bench.run(*rule), code)
    expected = {"plan": ["calibration.safetensors", "config.toml"],
                "fit": ["calibration.safetensors", "config.toml", "plan.json"]}  # fmt: skip
    assert names(bench) == expected[stage]
    if stage == "plan":
        (way,) = re.findall("`compress ([^`]+)`", text)
        failing(monkeypatch, "job.calibrate", AssertionError("calibrated again"))
        done = command(*shlex.split(way), "--macs", "0.8")
        assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_what_ends_a_run_from_outside_leaves_nothing(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    failing(monkeypatch, "run.assess", error)
    assert bench.run(*RANKS).exit_code != 0
    assert bench.leftovers() == []


def test_an_early_failure_leaves_nothing(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.pipeline.unfinished.WORTH_KEEPING", 0.0)
    failing(monkeypatch, "job.calibrate", DataError("The image 7 cannot be read."))
    assert bench.run(*RANKS).exit_code == 3
    assert bench.leftovers() == []


def test_a_broken_limit_keeps_no_model_even_where_its_report_cannot_be_written(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = ("--max-layer-relative-mse", "1e-9")
    with monkeypatch.context() as patch:
        failing(patch, "folder.write_report", ArtefactError("no."))
        assert "kept" not in paragraph(bench.run(*RANKS, *limit), 3)
    assert bench.leftovers() == []
    assert bench.run(*RANKS, *limit).exit_code == 1
    assert bench.leftovers() == ["out"]


def test_what_an_earlier_run_left_is_replaced_and_nothing_else_is(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bench.output("out.unfinished")
    failing(monkeypatch, "run.assess", DataError("no."))
    assert bench.run(*RANKS).exit_code == 3
    first = (folder / "plan.json").read_text()
    statistics = (folder / "calibration.safetensors").read_bytes()
    # A run that reads the statistics from there and fails again must not lose them.
    again = ("--calibration", str(folder / "calibration.safetensors"))
    assert bench.run("--rank", "conv2=5", *again).exit_code == 3
    assert names(bench) == WHOLE
    assert (folder / "plan.json").read_text() != first
    assert (folder / "calibration.safetensors").read_bytes() == statistics

    (folder / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    text = paragraph(bench.run(*RANKS), 3)
    assert text.endswith(f"could not be kept in {folder} either.")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert bench.leftovers() == ["out.unfinished"]


def test_a_program_finds_it_in_a_note(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "run.assess", DataError("no."))
    pixels, labels = made_images(48, seed=1)
    images = (torch.tensor(pixels).unsqueeze(1).float() / 255, torch.tensor(labels))
    given: dict[str, Any] = {"spec": SPEC, "rank": {"conv2": "4"}}
    with pytest.raises(DataError) as caught:
        compress_model(trained(), images, output=str(bench.output()), **given)
    (note,) = caught.value.__notes__
    assert str(bench.output("out.unfinished")) in note
    assert "`" not in note  # no command line has this model
    failing(monkeypatch, "run.assess", DataError("no."))
    with pytest.raises(DataError) as caught:
        compress_model(trained(), images, **given)
    assert not hasattr(caught.value, "__notes__")


def test_room_is_made_for_all_files_of_a_checkpoint(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    weight_map = {}
    for name in ("a", "b"):
        save_file({name: torch.zeros(2_000_000)}, shards / f"{name}.safetensors")
        weight_map[name] = f"{name}.safetensors"
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    usage = shutil.disk_usage(tmp_path)
    # A twentieth of 16 MB, and the report.
    for free, fits in ((950_000, True), (850_000, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, n=free: usage._replace(free=n))
        for checkpoint in (index, shards):
            config = make_config({"checkpoint": str(checkpoint), "output": str(bench.output())})
            if fits:
                check_places(config)
                continue
            with pytest.raises(ArtefactError, match="free some space"):
                check_places(config)
