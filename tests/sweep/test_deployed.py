"""Files of a sweep in float and in eight bits: fronts, the answer in words, and whole sweeps."""

from __future__ import annotations

import csv
import itertools
import json
import random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stopwatch import stop_the_clock
from workbench import SPEC, Workbench, command, paragraph

from compress.errors import GateError
from compress.report.deployed import rows, sentences, shown_rows
from compress.report.text import MINUS, TIMES
from compress.result import Deployed, EndMetric, SweepPoint
from compress.sweep.deployed import with_fronts


def metric(accuracy: float) -> EndMetric:
    return EndMetric(images=100, top1_before=0.9, top1_after=accuracy, drop=100 * (0.9 - accuracy))


def file(size: int, ratio: float | None, accuracy: float, *, int8: bool = False) -> Deployed:
    return Deployed(int8, size, ratio, ratio, validation=metric(accuracy))


def test_fronts_are_what_nothing_beats() -> None:
    draw = random.Random(3)
    values = [
        (draw.randrange(1, 6), draw.choice([0.2, 0.4, 0.6]), draw.choice([0.5, 0.6, 0.7]))
        for _ in range(40)
    ]
    files = [file(*v) for v in values]
    points = [
        SweepPoint("macs", 0.5, 1, 1, 1, 0.5, deployed=(a, b))
        for a, b in zip(files[2::2], files[3::2], strict=True)
    ]
    dense, marked = with_fronts(files[:2], points)
    found = [*dense, *itertools.chain.from_iterable(p.deployed for p in marked)]
    for each, (size, ratio, accuracy) in zip(found, values, strict=True):
        assert each.by_bytes == (not any(
            s <= size and a >= accuracy and (s, a) != (size, accuracy) for s, _, a in values
        ))  # fmt: skip
        assert each.by_time == (not any(
            r <= ratio and a >= accuracy and (r, a) != (ratio, accuracy) for _, r, a in values
        ))  # fmt: skip


def test_what_was_not_timed_is_on_no_front_of_time() -> None:
    (one,), _ = with_fronts([file(1, None, 0.5)], [])
    assert (one.by_time, one.by_bytes) == (False, True)


def report(*points: tuple[float, Deployed, Deployed], dense: tuple[Deployed, Deployed]) -> Any:
    from compress.report import build_sweep_report
    from compress.result import SweepResult, Versions

    made = [
        SweepPoint("macs", value, 1, 1, 1, value, deployed=files)
        for value, *files_ in points
        for files in [tuple(files_)]
    ]
    fronts, made = with_fronts(dense, made)
    return build_sweep_report(
        SweepResult(Versions("1", "2", "3"), "net", tuple(made), deployed=fronts,
                    deployed_on="onnxruntime", deployed_batch=8)
    )  # fmt: skip


DENSE = (file(1000, 1.0, 0.9), file(260, 0.5, 0.89, int8=True))


def test_the_answer_in_words() -> None:
    made = report(
        (0.5, file(500, 0.6, 0.88), file(140, 0.3, 0.87, int8=True)),
        (0.3, file(300, 0.4, 0.8), file(90, 0.2, 0.7, int8=True)),
        dense=DENSE,
    )
    said = " ".join(sentences(made))
    alone = f"Eight bits alone come to 89.00% ({MINUS}1.00 points) at {TIMES}0.50 of the time and"
    assert f"{alone} {TIMES}0.26 of the size of the dense network in float." in said
    assert "In float, the best point that is as fast, macs 0.3, comes to 80.00%" in said
    assert f"is as small: the least, macs 0.3, has {TIMES}0.30 of the size." in said
    both = f"macs 0.5 comes to 87.00% ({MINUS}3.00 points) at {TIMES}0.30 of the time"
    assert f"Of both together, {both}" in said
    found = rows(made)
    assert [row["label"] for row in found] == [
        "dense",
        "dense",
        *["macs 0.5"] * 2,
        *["macs 0.3"] * 2,
    ]
    assert [row["by_time"] for row in found] == [True, True, False, True, False, True]
    assert shown_rows(made)[1][:4] == (
        "dense", "eight bits", f"{TIMES}0.50 (500.00 ms)", f"{TIMES}0.26 (260 B)"
    )  # fmt: skip


def test_where_eight_bits_alone_win_it_is_said() -> None:
    made = report((0.5, file(500, 0.6, 0.88), file(300, 0.55, 0.87, int8=True)), dense=DENSE)
    assert sentences(made)[-1] == "Both together are never better than one of them alone."


def test_points_that_were_not_timed_are_left_out_of_the_words_on_time() -> None:
    made = report(
        (0.5, file(500, None, 0.88), file(140, None, 0.87, int8=True)),
        (0.3, file(300, 0.4, 0.8), file(90, 0.2, 0.7, int8=True)),
        dense=DENSE,
    )
    said = " ".join(sentences(made))
    assert "the best point that is as fast, macs 0.3" in said
    made = report((0.5, *(file(9, None, 0.8, int8=b) for b in (False, True))), dense=DENSE)
    assert "as fast" not in " ".join(sentences(made))


@pytest.mark.usefixtures("quick")
def test_a_checkpoint_in_half_precision_is_compared_too(bench: Workbench) -> None:
    state = load_file(bench.checkpoint)
    save_file({k: t.half() if t.is_floating_point() else t for k, t in state.items()},
              bench.checkpoint)  # fmt: skip
    done = sweeping(bench, "--macs", "0.6")
    assert done.exit_code == 0, done.stderr
    other = sweeping(bench, "--macs", "0.6", "--latency-batch", "4", "--resume")
    assert "kept" not in other.stdout  # since times would be of other batches


@pytest.mark.usefixtures("quick")
def test_a_file_that_computes_something_else_is_no_broken_limit(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parted(*_: object) -> None:
        raise GateError("The exported network's output differs.")

    monkeypatch.setattr("compress.sweep.deployed.compare_outputs", parted)
    assert "output differs" in paragraph(sweeping(bench, "--macs", "0.6"), 3)


@pytest.mark.usefixtures("quick")
def test_a_sweep_compares_files(bench: Workbench) -> None:
    done = sweeping(bench, "--macs", "0.8,0.6")
    assert done.exit_code == 0, done.stderr
    assert "Eight bits alone come to" in done.stdout
    made = json.loads((bench.output() / "report.json").read_text())
    sweep = made["sweep"]
    assert (sweep["deployed_on"], sweep["deployed_batch"]) == ("onnxruntime", 8)
    for point in sweep["points"]:
        in_float, int8 = point["deployed"]
        assert (in_float["int8"], int8["int8"]) == (False, True)
        assert in_float["validation"] == point["validation"]
        assert int8["bytes"] > 0
        assert int8["test"]["images"] == in_float["test"]["images"] == 24
        assert (in_float["ratio"], int8["ratio"]) == (1.0, 1.0)
    page = (bench.output() / "report.html").read_text()
    assert 'id="plot-files-time"' in page
    assert "As files, in float and in eight bits" in (bench.output() / "report.md").read_text()
    with (bench.output() / "sweep.csv").open() as table:
        first = next(csv.DictReader(table))
    assert int(first["int8 bytes"]) == sweep["points"][0]["deployed"][1]["bytes"]
    again = sweeping(bench, "--macs", "0.8,0.6", "--resume")
    assert again.exit_code == 0
    assert again.stdout.count("kept") == 2
    plain = sweeping(bench, "--macs", "0.8", "--resume", int8=False)
    assert "kept" not in plain.stdout  # it has no files, so that it is another point


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_the_clock(monkeypatch)


def sweeping(bench: Workbench, *flags: str, int8: bool = True) -> Any:
    return command(
        "sweep", bench.checkpoint, "--model", SPEC, "--data", bench.train, "--test", bench.test,
        "--output", str(bench.output()), "--no-refit", *(("--int8",) if int8 else ()), *flags,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--device", "meta"), "--device"),
        (("--calibration-images", "3"), "--int8 needs at least 4 images"),
    ],
)
def test_what_cannot_be_compared_is_said(
    bench: Workbench, flags: tuple[str, ...], said: str
) -> None:
    if "meta" in flags and not torch.empty(0, device="meta").is_meta:
        pytest.skip("no meta device")
    assert said in paragraph(sweeping(bench, "--macs", "0.8", *flags), 2 if "meta" in flags else 3)
    assert not (bench.output() / "report.json").exists()
