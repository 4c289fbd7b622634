"""Sweeps: the grid, the pick, points that equal single runs, and going on after a stop."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import body_of, flipped
from places import DOCS
from safetensors.torch import load_file, save_file
from small_network import write_network
from stopwatch import stop_the_clock

import compress
from compress.config import make_config
from compress.data import Loader, batches
from compress.data.held import hold
from compress.errors import (
    ArtefactError,
    BudgetError,
    CalibrationError,
    ConfigError,
    DataError,
    GateError,
)
from compress.files import sealed_record
from compress.inputs.load import load_network
from compress.pipeline.run import compress_network
from compress.pipeline.run import run as run_once
from compress.report import read_report
from compress.result import EndMetric, Interval, SweepPoint
from compress.sweep import Grid, Options, parse_grid, parse_pick, sweep, sweep_network
from compress.sweep.pick import QUANTITIES
from compress.sweep.store import PointStore
from compress.sweep.work import pareto

THRESHOLDS = "0.01,0.03,0.1,0.3"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_network(tmp_path_factory.mktemp("network"))


@pytest.fixture
def config(network: Any, tmp_path: Path) -> Any:
    return make_config({**network, "output": str(tmp_path / "sweep")})


@pytest.fixture(autouse=True)
def no_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of whole networks take seconds to measure, and no test here is about them."""
    stop_the_clock(monkeypatch)


class Journal:
    """Notes what is tracked, and which points finish and whether they were finished before."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.tracked: list[str] = []
        self.points: list[tuple[float, bool]] = []
        self.stop_after = stop_after

    def track(self, items: Any, description: Any, total: Any) -> Any:
        del total
        self.tracked.append(description)
        return items

    def note(self, point: Any, finished_before: Any) -> None:
        self.points.append((point.value, finished_before))
        if len(self.points) == self.stop_after:
            raise KeyboardInterrupt

    def options(self, test_points: Any = True) -> Any:
        return Options(
            test_points,
            self.track,
            lambda point: self.note(point, False),
            lambda point: self.note(point, True),
        )


def swept(
    config: Any,
    text: Any = THRESHOLDS,
    rule: Any = "threshold",
    journal: Any = None,
    test_points: Any = True,
    **how: Any,
) -> Any:
    options = (journal or Journal()).options(test_points)
    return sweep(config, parse_grid(rule, text), options=options, **how)


# --- The grid and the pick ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "text", "values"),
    [
        ("threshold", "1e-4:1e-1:4", (1e-4, 1e-3, 1e-2, 1e-1)),
        ("threshold", "0.1:0.001:3", (0.1, 0.01, 0.001)),
        ("threshold", "0.1:0.9:1", (0.1,)),
        ("threshold", "0, 1e-3", (0.0, 1e-3)),
        ("macs", "0.9:0.3:7", (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)),
        ("energy", "0.9,0.99,0.9", (0.9, 0.99)),
        ("params", "0.5", (0.5,)),
    ],
)
def test_grids_are_read(rule: Any, text: Any, values: Any) -> None:
    assert parse_grid(rule, text).values == pytest.approx(values, rel=1e-12)


def test_a_range_of_thresholds_has_equal_steps_in_the_logarithm() -> None:
    values = np.array(parse_grid("threshold", "1e-4:1e-1:9").values)
    assert (values[0], values[-1], len(values)) == (1e-4, 1e-1, 9)
    np.testing.assert_allclose(np.diff(np.log10(values)), 3 / 8, atol=2e-4)


@pytest.mark.parametrize(
    ("rule", "text", "words"),
    [
        ("threshold", "", "--thresholds is empty"),
        ("threshold", " , ", "--thresholds is empty"),
        ("macs", "half", "'half' is not a number"),
        ("macs", "0.9:0.1", "is not a grid"),
        ("macs", "0.9:0.1:0", "not a whole number from 1"),
        ("macs", "0.9:0.1:2.5", "not a whole number from 1"),
        ("macs", "0.9,1.5", r"macs = 1.5 is outside \(0, 1\]"),
        ("macs", "0.9,0", r"macs = 0.0 is outside \(0, 1\]"),
        ("macs", "nan", "nan"),
        ("energy", "inf", "inf"),
        ("threshold", "0:0.1:5", "both ends must be above 0"),
        ("threshold", "1,0.1", r"threshold = 1.0 is outside \[0, 1\)"),
        ("latency", "0.5", "cannot walk along 'latency'"),
    ],
)
def test_grids_that_are_none_are_refused(rule: Any, text: Any, words: Any) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_grid(rule, text)


def metric(drop: float, kl: float = 0.01) -> EndMetric:
    return EndMetric(
        images=100, top1_before=0.9, top1_after=0.9 - drop / 100, drop=drop, mean_kl=kl,
        drop_interval=Interval(drop - 1, drop + 1), agreement=0.95,
    )  # fmt: skip


def point(macs: int, drop: float | None, params: int = 10, value: float = 0.1) -> SweepPoint:
    measured = None if drop is None else metric(drop)
    return SweepPoint("macs", value, macs, params, 4 * params, macs / 100, validation=measured)


def test_a_pick_takes_the_fewest_macs_that_satisfy_it() -> None:
    points = [point(90, 0.0), point(50, 0.4), point(40, 0.6), point(10, None)]
    assert parse_pick("drop<=0.5").choose(points) == 1
    assert parse_pick("drop<0.6").choose(points) == 1
    assert parse_pick("drop<=0.6").choose(points) == 2
    assert parse_pick("drop<=0.6, drop_upper<=1.45").choose(points) == 1
    assert parse_pick("accuracy>=0.8999").choose(points) == 0
    assert parse_pick("macs<=0.2").choose(points) == 3
    assert parse_pick("macs<=0.2, drop<=5").choose(points) is None
    assert parse_pick("agreement>0.96").choose(points) is None
    assert "macs 0.1 with drop 0.6" in parse_pick("drop<=-1").nearest([point(40, 0.6)])


def test_of_points_with_equal_macs_the_one_with_fewer_parameters_is_picked() -> None:
    points = [point(50, 0.1, params=30), point(50, 0.1, params=20), point(50, 0.1, params=20)]
    assert parse_pick("drop<=1").choose(points) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is not a condition"),
        ("drop", "'drop' is not a condition"),
        ("drop=0.5", "is not a condition"),
        ("drops<=0.5", "no quantity 'drops'. Did you mean 'drop'"),
        ("drop<=half", "'half' is not a number"),
        ("drop<=nan", "'nan' is not a number"),
        ("drop<=0.5,,kl<1", "'' is not a condition"),
    ],
)
def test_picks_that_are_none_are_refused(text: Any, words: Any) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_pick(text)


def test_the_pareto_front_is_what_no_point_beats() -> None:
    points = [point(90, 0.0), point(80, 0.5), point(80, 0.4), point(60, 0.4), point(10, 9.0)]
    assert [p.pareto for p in pareto(points)] == [True, False, False, True, True]
    same = [point(50, 1.0), point(50, 1.0)]
    assert [p.pareto for p in pareto(same)] == [True, True]


# --- Points ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "text"),
    [("threshold", "0.03,0.2"), ("energy", "0.9,0.8"), ("macs", "0.8,0.4"), ("params", "0.5")],
)
def test_every_point_is_what_a_single_run_gives(network: Any, rule: Any, text: Any) -> None:
    config = make_config(network)
    inputs = load_network(config)
    result = sweep_network(inputs, config, parse_grid(rule, text))
    for swept_point in result.points:
        alone = compress_network(inputs, config.with_rule(rule, swept_point.value))
        rewritten = {c.name: c.ranks for c in alone.plan.choices if c.rewritten}
        assert rewritten
        assert swept_point.ranks == rewritten
        assert swept_point.schemes == {c.name: c.scheme for c in alone.plan.choices}
        widths = {c.name: c.width for c in alone.plan.choices if c.width is not None}
        assert swept_point.widths == widths
        cost = alone.result.cost.compressed
        assert (swept_point.macs, swept_point.params, swept_point.bytes) == (
            cost.macs, cost.params, cost.bytes,
        )  # fmt: skip
        assert swept_point.ratio == cost.macs / alone.result.cost.folded.macs
        for found, expected in (
            (swept_point.validation, alone.result.validation),
            (swept_point.test, alone.result.test),
        ):
            assert expected is not None
            assert found == dataclasses.replace(expected, to_wrong=(), to_right=())


def test_parameters_never_grow_as_the_threshold_rises(network: Any) -> None:
    config = make_config(network)
    grid = parse_grid("threshold", "1e-3:0.99:8")
    result = sweep_network(load_network(config), config, grid, Options(test_points=False))
    params = [p.params for p in result.points]
    macs = [p.macs for p in result.points]
    assert params == sorted(params, reverse=True)
    assert macs == sorted(macs, reverse=True)
    assert len(set(params)) > 4
    assert all(p.test is None for p in result.points)


def test_a_sweep_calibrates_once_and_measures_equal_networks_once(config: Any) -> None:
    journal = Journal()
    grid = "1e-9,1e-8,0.1,0.2"
    result = swept(config, grid, journal=journal).result
    first, second = result.points[:2]
    assert first.ranks == second.ranks == {}
    assert (first.validation, first.macs) == (second.validation, second.macs)
    assert first.validation.drop == 0
    assert journal.tracked.count("calibrate") == 1
    assert journal.tracked.count("validation: original") == 1
    assert journal.tracked.count("test: original") == 1
    assert journal.tracked.count("test: compressed") == 3


def test_a_metric_of_the_users_own_is_measured_once_for_the_original(network: Any) -> None:
    code = Path(network["model"].rpartition(":")[0])
    config = make_config({**network, "metric_fn": f"{code}:brightness"})
    result = sweep_network(load_network(config), config, parse_grid("macs", "0.8,0.4"))
    befores = {p.validation.custom.before for p in result.points}
    assert len(befores) == 1
    for p in result.points:
        assert p.validation.custom.name == config.metric_fn
        assert p.validation.drop == p.validation.custom.before - p.validation.custom.after


def test_images_held_in_memory_are_the_images(network: Any) -> None:
    images = load_network(make_config(network)).test
    held = hold(images, Loader(32))
    assert held is not images
    for one, other in zip(batches(held, 50), batches(images, 50), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(held.stack([5, 3]), images.stack([5, 3]), rtol=0, atol=0)
    assert held.labels == images.labels
    assert hold(images, Loader(32), cap=100) is images


def test_one_point_is_a_sweep_with_a_word_about_it(config: Any) -> None:
    result = swept(config, "0.1").result
    assert len(result.points) == 1
    assert any("one point" in warning for warning in result.warnings)
    assert read_report(config.output)["sweep"]["points"][0]["value"] == 0.1


def test_a_budget_out_of_reach_stops_the_sweep_before_any_point(config: Any) -> None:
    journal = Journal()
    with pytest.raises(BudgetError, match="smallest reachable"):
        swept(config, "0.5,0.001", "macs", journal)
    assert journal.points == []


# --- What is written, and going on -------------------------------------------------------------


def same_numbers(one: Any, other: Any) -> Any:
    """Points but for the seconds that they took."""
    return [dataclasses.replace(p, seconds=None) for p in one.points] == [
        dataclasses.replace(p, seconds=None) for p in other.points
    ]


def test_a_sweep_that_was_stopped_goes_on_without_redoing_a_point(
    config: Any, tmp_path: Path
) -> None:
    whole = swept(config.replace(output=str(tmp_path / "whole"))).result
    with pytest.raises(KeyboardInterrupt):
        swept(config, journal=Journal(stop_after=2))
    with pytest.raises(ArtefactError, match="--resume"):
        swept(config)
    journal = Journal()
    resumed = swept(config, journal=journal, resume=True).result
    assert journal.points == [(0.01, True), (0.03, True), (0.1, False), (0.3, False)]
    assert "calibrate" not in journal.tracked
    assert same_numbers(resumed, whole)
    again = Journal()
    assert same_numbers(swept(config, journal=again, resume=True).result, whole)
    assert all(before for _, before in again.points)
    assert again.tracked == []
    names = {p.name for p in Path(config.output).iterdir()}
    assert names == {
        "report.json", "report.md", "report.html", "sweep.csv", "config.toml", "sweep.points",
    }  # fmt: skip


@pytest.mark.parametrize(
    "change", ["weights", "labels", "images", "code", "helper", "metric", "classes", "setting"]
)
def test_points_of_other_content_are_never_taken(change: Any, tmp_path: Path) -> None:
    network = write_network(tmp_path / "network")
    config = make_config({**network, "output": str(tmp_path / "sweep")})
    folder = tmp_path / "network"
    if change == "metric":
        (folder / "own.py").write_text("def constant(model, batches):\n    return 1.0\n")
        config = config.replace(metric_fn=f"{folder / 'own.py'}:constant")
    swept(config, "0.03,0.1")
    if change == "weights":
        state = load_file(folder / "weights.safetensors")
        state["0.weight"][0] *= 1.5
        save_file(state, folder / "weights.safetensors")
    elif change in ("labels", "images"):
        arrays = dict(np.load(folder / "test.npz"))
        arrays[change] = arrays[change].copy()
        arrays[change][0] += 1 if change == "images" else -arrays[change][0]
        arrays["labels"][0] = (arrays["labels"][0] + 1) % 6
        np.savez(folder / "test.npz", **arrays)
    elif change == "helper":  # what a forward may call
        code = folder / "net.py"
        code.write_text(code.read_text() + "\n\ndef scaled(x):\n    return 2 * x\n")
        sys.modules.pop("net", None)
    elif change == "metric":
        (folder / "own.py").write_text("def constant(model, batches):\n    return 0.5\n")
    elif change == "classes":
        names = [str(n) for n in (1, 0, 2, 3, 4, 5)]
        (folder / "classes.json").write_text(json.dumps(names))
        config = config.replace(class_map=str(folder / "classes.json"))
    elif change == "code":
        code = folder / "net.py"
        code.write_text(code.read_text().replace("nn.ReLU()", "nn.LeakyReLU(0.2)"))
    else:
        config = config.replace(seed=1)
    journal = Journal()
    swept(config, "0.03,0.1", journal=journal, resume=True)
    assert journal.points == [(0.03, False), (0.1, False)]


def _edited(file: Path) -> None:
    record = json.loads(file.read_text())
    record["point"]["validation"]["top1_after"] = 1.0
    file.write_text(json.dumps(record))


def _without_digest(file: Path) -> None:
    record = json.loads(file.read_text())
    del record["sha256"]
    file.write_text(json.dumps(record))


def _under_another_name(file: Path) -> None:
    digest = "0" * 16
    other = file.with_name(f"{file.stem[: -len(digest)]}{digest}.json")
    record = json.loads(file.read_text())
    record["key"]["weights"] = "others"
    other.write_text(json.dumps(sealed_record({k: record[k] for k in ("key", "point")})))
    other.replace(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_edited, "was damaged or edited since it was written"),
        (_without_digest, "carries no digest"),
        (_under_another_name, "is of other inputs"),
        (lambda file: file.write_text(file.read_text()[:200]), "is damaged"),
        (lambda file: file.write_text("[]"), "was damaged or edited"),
        (lambda file: file.write_bytes(b"\xff\xfe"), "is damaged"),
    ],
)
def test_points_that_are_not_what_was_written_are_refused(
    network: Any, tmp_path: Path, change: Any, message: str
) -> None:
    config = make_config({**network, "output": str(tmp_path / "sweep"), "refit": False})
    swept(config, "0.1")
    (file,) = (tmp_path / "sweep" / "sweep.points").iterdir()
    change(file)
    with pytest.raises(ArtefactError, match=rf"{file.name} {message}.*delete it"):
        swept(config, "0.1", resume=True)
    assert read_report(config.output)["kind"] == "sweep"  # as it was
    file.unlink()
    journal = Journal()
    swept(config, "0.1", journal=journal, resume=True)
    assert journal.points == [(0.1, False)]


def test_no_flipped_bit_of_a_point_is_accepted(network: Any, tmp_path: Path) -> None:
    config = make_config({**network, "output": str(tmp_path / "sweep"), "refit": False})
    swept(config, "0.1")
    (file,) = (tmp_path / "sweep" / "sweep.points").iterdir()
    key = json.loads(file.read_text())["key"]
    store = PointStore(tmp_path / "sweep", key)
    assert store.path("threshold", 0.1) == file
    whole = store.read("threshold", 0.1)
    assert whole is not None
    for _ in flipped(file, 1000):
        with suppress(ArtefactError):  # a space that became another one is no damage
            assert store.read("threshold", 0.1) == whole
    assert store.read("threshold", 0.1) == whole


def test_damaged_statistics_of_a_sweep_are_refused(config: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        swept(config, journal=Journal(stop_after=1))
    (file,) = Path(config.output).glob("sweep.calibration-*")
    for _ in flipped(file, 3, body_of(file)):
        with pytest.raises(CalibrationError, match=f"{file.name} was damaged or edited"):
            swept(config, resume=True)


def test_names_and_speed_do_not_make_other_content(tmp_path: Path) -> None:
    network = write_network(tmp_path / "network")
    config = make_config({**network, "output": str(tmp_path / "sweep")})
    swept(config, "0.1")
    shutil.copytree(tmp_path / "network", tmp_path / "moved")
    moved = {k: v.replace("network", "moved") for k, v in network.items()}
    journal = Journal()
    again = make_config({**moved, "output": config.output, "batch_size": 7, "max_drop": 1.0})
    swept(again, "0.1", journal=journal, resume=True)
    assert journal.points == [(0.1, True)]


def test_folders_that_are_no_sweeps_are_refused(config: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    for options in ({}, {"resume": True}):
        with pytest.raises(ArtefactError, match=r"thesis\.tex"):
            swept(config.replace(output=str(folder), force=True), "0.1", **options)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ArtefactError, match="is a file"):
        swept(config.replace(output=str(file)), "0.1")
    with pytest.raises(ConfigError, match="--output"):
        swept(config.replace(output=""), "0.1")


def test_force_starts_over(config: Any) -> None:
    swept(config, "0.1,0.2", pick=parse_pick("macs<=1"))
    journal = Journal()
    swept(config.replace(force=True), "0.1", journal=journal)
    assert journal.points == [(0.1, False)]
    assert len(list((Path(config.output) / "sweep.points").iterdir())) == 1
    assert not (Path(config.output) / "chosen").exists()


def test_what_is_left_of_a_sweep_that_failed_is_what_going_on_needs(
    config: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="matches no layer"):
        swept(config.replace(keep=("nothing*",)), "0.5", "macs")
    left = [p.name for p in Path(config.output).iterdir()]
    assert [name.startswith("sweep.calibration") for name in left] == [True]
    other = config.replace(checkpoint=str(tmp_path / "none.pt"), output=str(tmp_path / "other"))
    with pytest.raises(compress.errors.InputError):
        swept(other, "0.5")
    assert not (tmp_path / "other").exists()


# --- The chosen point --------------------------------------------------------------------------


def test_the_chosen_point_is_saved_as_a_run_saves_it(config: Any, tmp_path: Path) -> None:
    found = swept(config, "0.9,0.6,0.3", "macs", pick=parse_pick("drop<=20"))
    points = found.result.points
    fit = [p for p in points if p.validation.drop <= 20]
    expected = min(fit, key=lambda p: p.macs)
    chosen = [p for p in points if p.chosen]
    assert [p.value for p in chosen] == [expected.value]
    single = config.with_rule("macs", expected.value).replace(output=str(tmp_path / "single"))
    run_once(single)
    folder = Path(config.output) / "chosen"
    assert (folder / "model.safetensors").read_bytes() == (
        tmp_path / "single" / "model.safetensors"
    ).read_bytes()
    saved = read_report(folder)
    assert saved["verdict"] == "passed"
    assert saved["headline"]["after"] == chosen[0].test.top1_after
    assert "calibration" not in (folder / "config.toml").read_text().replace(
        "calibration_images", ""
    ).replace('calibration = ""', "")
    report = read_report(config.output)
    assert (report["verdict"], report["sweep"]["pick"]) == ("passed", "drop<=20")
    with pytest.raises(ArtefactError):
        compress.load(folder)
    assert compress.load(folder, trust_code=True)(torch.zeros(1, 1, 10, 10)).shape == (1, 6)


def test_a_pick_that_no_point_satisfies_fails_and_keeps_the_reports(config: Any) -> None:
    swept(config, "0.3", pick=parse_pick("macs<=1"))
    with pytest.raises(GateError, match=r"Nearest is threshold 0.3 with drop \d"):
        swept(config, "0.3", pick=parse_pick("drop<=-50"), resume=True)
    folder = Path(config.output)
    assert not (folder / "chosen").exists()
    assert not any(p["chosen"] for p in read_report(folder)["sweep"]["points"])


def test_a_chosen_point_that_breaks_a_gate_is_not_saved(config: Any) -> None:
    strict = config.replace(min_agreement=0.999)
    with pytest.raises(GateError, match="agreement"):
        swept(strict, "0.3", pick=parse_pick("macs<=1"))
    folder = Path(config.output) / "chosen"
    assert not (folder / "model.safetensors").exists()
    assert read_report(folder)["verdict"] == "failed"


def test_only_the_chosen_point_meets_the_test_set_if_asked(config: Any) -> None:
    pick = parse_pick("macs<=1")
    result = swept(config, "0.1,0.3", pick=pick, test_points=False).result
    assert [p.test is not None for p in result.points] == [p.chosen for p in result.points]


def test_images_without_labels_can_be_picked_by_agreement_alone(
    network: Any, tmp_path: Path
) -> None:
    arrays = np.load(network["data"].removeprefix("tensors:"))
    np.savez(tmp_path / "bare.npz", images=arrays["images"])
    bare = {**network, "data": f"tensors:{tmp_path / 'bare.npz'}", "test": ""}
    config = make_config({**bare, "output": str(tmp_path / "sweep")})
    with pytest.raises(DataError, match="needs labels"):
        swept(config, "0.1", pick=parse_pick("drop<=1"))
    result = swept(config, "0.01,0.1", pick=parse_pick("agreement>=0.1")).result
    assert [p.chosen for p in result.points] == [False, True]
    assert all(p.validation.drop is None for p in result.points)
    assert any("Unverified" in warning for warning in result.warnings)
    assert read_report(config.output)["verdict"] == "unverified"


def test_the_record_of_a_point_says_what_it_depends_on(config: Any) -> None:
    swept(config, "0.1")
    (file,) = (Path(config.output) / "sweep.points").iterdir()
    key = json.loads(file.read_text())["key"]
    assert {"weights", "code", "fit", "validation", "test", "settings"} <= set(key)
    assert "checkpoint" not in key["settings"]


def test_a_grid_is_a_rule_of_its_own(config: Any) -> None:
    grid = Grid("macs", (0.5,))
    assert str(grid) == "--macs 0.5"
    assert grid.at(config.with_rule("threshold", 0.1), 0.5).rule == "macs"


def test_every_quantity_is_documented() -> None:
    page = (DOCS / "reference" / "sweep.md").read_text(encoding="utf-8")
    for quantity in QUANTITIES:
        assert f"| `{quantity}` |" in page
