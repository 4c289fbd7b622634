"""What is timed of a result, and how long that may take; no real clock decides anything here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from compress.config import RunConfig
from compress.measure import speed
from compress.measure.speed import Stopwatch, costs
from compress.network.baseline import Network, prepare
from compress.timing.networks import Timing
from compress.timing.turns import Pace


class Timer:
    """Says how long a batch takes, and moves the clock by what that costs."""

    def __init__(self, patch: pytest.MonkeyPatch, seconds: float) -> None:
        self.seconds, self.now = seconds, 0.0
        self.paces: dict[int, float] = {}
        patch.setattr(speed, "time_network_formats", self.timed)
        patch.setattr(speed.time, "perf_counter", lambda: self.now)

    def timed(
        self, models: Mapping[str, Any], images: Any, formats: Sequence[str], pace: Pace
    ) -> dict[tuple[str, str], Timing]:
        count = len(images)
        self.paces[count] = pace.most_seconds
        pairs = [(name, form) for name in models for form in formats]
        self.now += self.seconds * count * len(pairs)
        return {pair: Timing(self.seconds * count, 3, count, pair[1], 1) for pair in pairs}


@pytest.fixture(scope="module")
def network() -> Network:
    return prepare(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3)).eval(),
                   torch.randn(1, 1, 8, 8))  # fmt: skip


def test_a_tenth_of_the_time_before_is_spent_or_five_seconds() -> None:
    config = RunConfig(latency_batch=4)
    assert Stopwatch.of(config, 300.0).most_seconds == pytest.approx(30.0)
    assert Stopwatch.of(config, 12.0).most_seconds == 5.0
    assert Stopwatch.of(config, 12.0).batch == 4
    assert Stopwatch.of(config.replace(no_latency=True), 300.0).most_seconds is None


def test_batches_share_the_time(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(monkeypatch, 0.25)  # a second a round of one, in both formats
    cost = costs(network, network.model, torch.float32, Stopwatch(8, (), 20.0))
    assert timer.paces == {1: 10.0, 8: 19.0}
    assert [row.batch_size for row in cost.latency] == [1, 8]
    assert [row.runs for row in cost.latency] == [3, 3]
    assert cost.too_slow == ()


def test_a_batch_of_which_a_round_takes_too_long_is_left_out(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = Timer(monkeypatch, 1.0)
    cost = costs(network, network.model, torch.float32, Stopwatch(8, (), 20.0))
    assert timer.paces == {1: 10.0}
    assert [row.batch_size for row in cost.latency] == [1]
    assert cost.too_slow == (8,)


def test_nothing_is_timed_on_request(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(monkeypatch, 1.0)
    cost = costs(network, network.model, torch.float32, Stopwatch(8, (), None))
    assert timer.paces == {}
    assert (cost.latency, cost.too_slow, cost.memory_format) == ((), (), "contiguous")
    only = costs(network, network.model, torch.float32, Stopwatch(8, ("channels_last",), None))
    assert only.memory_format == "channels_last"
    assert cost.folded is not None
    assert cost.folded.macs == network.macs
