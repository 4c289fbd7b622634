"""Whole runs that take channels out under a budget of time, with made-up times."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from made_up_time import use_made_up_times
from networks.narrow import mobile, settled, vgg
from torch import Tensor
from workbench import made_images

import compress
from compress.choose.by_time import plan as by_time
from compress.choose.by_time.candidates import TimedBudgets
from compress.errors import BudgetError
from compress.linalg.schemes import SCHEME_NAMES
from compress.pipeline.outcome import Compressed
from compress.plan import NARROWER, Choice, read_plan

# By default a budget of time takes channels out only where ranks alone do not reach it.
ALL = ("narrow", "slice", "output", "input", "two_sided", "spatial")


def images(count: int) -> Tensor:
    pixels, _ = made_images(count, seed=1)
    return torch.tensor(pixels).unsqueeze(1).float() / 255


@pytest.fixture
def on_that_device(monkeypatch: pytest.MonkeyPatch) -> None:
    use_made_up_times(monkeypatch)


def run(build: Any = vgg, **given_: Any) -> Compressed:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = settled(build())
    given_ = {"latency": 0.5, "refit": False, "schemes": ALL, **given_}
    return compress.compress_model(model, images(48), **given_)


@pytest.mark.usefixtures("on_that_device")
@pytest.mark.parametrize("build", [vgg, mobile])
def test_a_run_narrows_and_keeps_its_time(build: Any) -> None:
    done = run(build)
    assert any(c.width is not None for c in done.plan.choices)
    timed = done.result.cost.latency[-1]
    assert timed.batch_size == 8
    assert timed.ratio <= 0.5
    for layer in done.result.layers:
        if layer.width is not None:
            assert layer.seconds is not None
            assert layer.dense_seconds is not None


@pytest.mark.usefixtures("on_that_device")
def test_without_being_asked_it_takes_channels_out_only_where_it_must() -> None:
    alone = run(latency=0.7, schemes=None)
    assert all(c.width is None for c in alone.plan.choices)
    assert any(c.rewritten for c in alone.plan.choices)
    with pytest.raises(BudgetError, match="cannot be reached"):
        run(latency=0.15, schemes=SCHEME_NAMES)
    must = run(latency=0.15, schemes=None)
    assert any(c.width is not None for c in must.plan.choices)
    assert must.result.cost.latency[-1].ratio <= 0.15


@pytest.mark.usefixtures("on_that_device")
def test_where_chains_turn_out_slow_channels_alone_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the network nothing with chains is as fast as its layers were by themselves."""
    plain, without = by_time._Timer.ratio, TimedBudgets.unfactored
    tried: list[TimedBudgets | None] = []

    def noted(self: TimedBudgets) -> TimedBudgets | None:
        tried.append(without(self))
        return tried[-1]

    def ratio(self: Any, choices: list[Choice], memory_format: str) -> float:
        return plain(self, choices, memory_format) if tried else 2.0

    monkeypatch.setattr(TimedBudgets, "unfactored", noted)
    monkeypatch.setattr(by_time._Timer, "ratio", ratio)
    done = run(latency=0.6)
    assert all(found is not None for found in tried)
    assert {c.scheme for c in done.plan.choices} <= {"dense", *NARROWER}
    assert done.result.cost.latency[-1].ratio <= 0.6
    tried.clear()
    monkeypatch.setattr(by_time._Timer, "ratio", lambda *_: 2.0)
    with pytest.raises(BudgetError, match="still takes 2 of the time"):
        run(latency=0.6, schemes=("output",))
    assert tried[0] is None


@pytest.mark.usefixtures("on_that_device")
def test_a_plan_made_by_time_can_be_edited_and_applied(tmp_path: Any) -> None:
    done = run(output=str(tmp_path / "out"), schemes=("narrow",))
    assert {c.scheme for c in done.plan.choices} == {"dense", "narrow"}
    file = tmp_path / "out" / "plan.json"
    raw = json.loads(file.read_text())
    names = [c["name"] for c in raw["choices"]]
    assert any(c["width"] for c in raw["choices"])
    for choice in raw["choices"]:  # back to the network as it was
        choice |= {"width": None, "scheme": "dense", "ranks": []}
    file.write_text(json.dumps(raw))
    plan = read_plan(file)
    assert plan.rule == "latency"
    assert [c.name for c in plan.choices] == names
    fitting = compress.choose.check_plan(plan, done.network.sites, done.network.channels)
    assert all(c.width is None for c in fitting.choices)


@pytest.mark.usefixtures("on_that_device")
def test_what_loses_more_than_promised_is_chosen_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.pipeline.promised.ratios", lambda *_: {})
    before = {c.name: c for c in run(schemes=("narrow",), augment=False).plan.choices}
    asked = []

    def dear(predicted: Mapping[str, float], *_: Any) -> dict[str, float]:
        asked.append(sorted(predicted))
        return dict.fromkeys(predicted, 1e6) if len(asked) == 1 else {}

    monkeypatch.setattr("compress.pipeline.promised.ratios", dear)
    narrow = run(schemes=("narrow",), augment=False)
    assert len(asked) == 2
    assert asked[0]
    # All are dearer by the same factor, so that the choice is the same, as it is for equal times.
    assert {c.name: replace(c, reason="") for c in narrow.plan.choices} == {
        n: replace(c, reason="") for n, c in before.items()
    }
