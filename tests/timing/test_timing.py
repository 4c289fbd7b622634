"""Timing by turns with a clock that the test drives; with the real one only plain facts."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import flipped
from torch import nn

from compress.errors import InputError
from compress.files import sealed_record
from compress.running.memory_format import in_memory_format
from compress.timing.layers import LatencyTable, Setting, describe_layer
from compress.timing.networks import Timing, time_network, time_network_formats
from compress.timing.turns import Case, Pace, measure, sample


class FakeTime:
    """A clock that only work moves, and a journal of that work."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Any:
        """Return a callable whose n-th call takes the n-th of ``seconds``, then the last again."""
        left = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_candidates_take_turns_and_the_median_of_a_call_is_returned() -> None:
    fake = FakeTime()
    runs = [fake.work("a", 2.0), fake.work("b", 5.0), fake.work("c", 1.0)]
    assert measure(runs, rounds=3, min_seconds=0.0, clock=fake.clock) == [2.0, 5.0, 1.0]
    assert "".join(fake.calls) == "aabbcc" + "abc" + "bca" + "cab"


def test_warm_up_is_not_counted_and_an_outlier_does_not_matter() -> None:
    fake = FakeTime()
    run = fake.work("a", 50.0, 2.0, 2.0, 2.0, 90.0, 2.0)
    assert measure([run], rounds=5, min_seconds=0.0, clock=fake.clock) == [2.0]


def test_drift_hits_all_candidates_alike() -> None:
    def slowing(fake: FakeTime, seconds: float) -> Any:
        def run() -> None:
            fake.now += seconds * (1 + fake.now / 100)

        return run

    fake, options = FakeTime(), {"rounds": 9, "min_seconds": 0.0}
    one, two = measure([slowing(fake, 1.0), slowing(fake, 2.0)], **options, clock=fake.clock)
    assert 1.8 < two / one < 2.2
    alone = FakeTime()
    one, two = (measure([slowing(alone, s)], **options, clock=alone.clock)[0] for s in (1.0, 2.0))
    assert two / one > 2.2


def test_fast_candidates_are_called_often_enough_in_each_turn() -> None:
    fake = FakeTime()
    runs = [fake.work("fast", 1 / 1024), fake.work("slow", 0.25)]
    assert measure(runs, rounds=4, min_seconds=0.5, clock=fake.clock) == [1 / 1024, 0.25]
    assert fake.calls.count("fast") == 2 + 512
    assert fake.calls.count("slow") == 2 + 4


def test_rounds_are_added_where_the_warm_up_was_slow() -> None:
    fake = FakeTime()
    measure([fake.work("a", 1.0, 1.0, 0.06)], rounds=10, min_seconds=1.0, clock=fake.clock)
    assert fake.calls.count("a") == 2 + 17
    fake = FakeTime()
    measure([fake.work("a", 1.0, 1.0, 0.0)], rounds=10, min_seconds=1.0, clock=fake.clock)
    assert fake.calls.count("a") == 2 + 40


def turns_of(fake: FakeTime, names: dict[str, float], **pace: float) -> list[list[float]]:
    cases = [Case(fake.work(name, seconds)) for name, seconds in names.items()]
    return sample(cases, Pace(clock=fake.clock, **pace), None)


def test_slow_candidates_get_fewer_rounds_and_stay_within_their_time() -> None:
    fake, slow = FakeTime(), {"a": 2.0, "b": 1.0}
    assert turns_of(fake, slow, most_seconds=100.0) == [[2.0] * 7, [1.0] * 7]
    for most in (20.0, 12.0, 30.0):
        fake = FakeTime()
        found = turns_of(fake, slow, most_seconds=most)
        rounds = min(7, int((most - 6) // 3))  # after two calls of each
        assert found == [[2.0] * rounds, [1.0] * rounds]
        assert fake.now <= most


def test_what_has_no_time_for_a_round_is_called_once() -> None:
    fake = FakeTime()
    assert turns_of(fake, {"a": 5.0, "b": 4.0}, most_seconds=10.0) == [[5.0], [4.0]]
    assert fake.calls == ["a", "b"]
    fake = FakeTime()
    assert turns_of(fake, {"a": 1.0, "b": 0.25}, most_seconds=2.0) == [[1.0], [0.25]]
    assert fake.calls == ["a", "b", "b"], "the one that is quick is warmed up"


def test_no_rounds_are_added_beyond_the_time() -> None:
    fake = FakeTime()
    run = Case(fake.work("a", 1.0, 1.0, 0.06))
    (found,) = sample([run], Pace(10, 2.0, fake.clock, 4.0), None)
    assert len(found) == 17  # a round is taken to last a second, as the warm-up did
    assert fake.now <= 4.0


def test_the_device_is_waited_for_before_each_reading() -> None:
    fake = FakeTime()
    waiting = {"seconds": 0.0}

    def launch() -> None:
        waiting["seconds"] += 3.0

    def synchronise() -> None:
        fake.now += waiting.pop("seconds")
        waiting["seconds"] = 0.0

    runs = [launch, fake.work("other", 0.5)]
    assert measure(runs, rounds=2, min_seconds=0.0, synchronise=synchronise, clock=fake.clock) == [
        3.0,
        0.5,
    ]


def test_measure_refuses_no_rounds_and_takes_no_candidates() -> None:
    assert measure([], rounds=3, min_seconds=0.0) == []
    with pytest.raises(ValueError, match="rounds"):
        measure([lambda: None], rounds=0, min_seconds=0.0)


class Timed(nn.Module):
    """A layer that takes fake time, and notes how it was run."""

    def __init__(self, fake: FakeTime, name: str, seconds: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fake, self.name, self.seconds = fake, name, seconds
        self.seen: set[tuple[bool, ...]] = set()

    def forward(self, x: Any) -> Any:
        self.fake.calls.append(self.name)
        last = {"memory_format": torch.channels_last}
        self.fake.now += self.seconds / (2 if x.is_contiguous(**last) else 1)
        self.seen.add(
            (
                torch.is_inference_mode_enabled(),
                self.training or self.norm.training,
                x.is_contiguous(**last),
                self.conv.weight.is_contiguous(**last),
            )
        )
        return self.norm(self.conv(x))

    def extra_repr(self) -> str:
        return self.name


def snapshot(model: nn.Module) -> list[object]:
    tensors = [*model.parameters(), *model.buffers()]
    return [
        [(id(t), t.data_ptr(), t.stride(), t.detach().clone().tolist()) for t in tensors],
        [m.training for m in model.modules()],
    ]


def test_networks_are_timed_in_turns_and_left_as_they_were() -> None:
    fake = FakeTime()
    models = {"dense": Timed(fake, "d", 4.0), "compressed": Timed(fake, "c", 3.0)}
    models["dense"].norm.eval()
    before = [snapshot(m) for m in models.values()]
    example = torch.randn(2, 3, 8, 8)
    random_state = torch.get_rng_state()
    timings = time_network_formats(models, example, pace=Pace(2, 0.0, fake.clock))
    threads = torch.get_num_threads()
    assert timings == {
        ("dense", "contiguous"): Timing(4.0, 2, 2, "contiguous", threads, 4.0),
        ("compressed", "contiguous"): Timing(3.0, 2, 2, "contiguous", threads, 3.0),
        ("dense", "channels_last"): Timing(2.0, 2, 2, "channels_last", threads, 2.0),
        ("compressed", "channels_last"): Timing(1.5, 2, 2, "channels_last", threads, 1.5),
    }
    assert "".join(fake.calls) == "ddccddcc" + "dcdc" + "cdcd"
    assert [snapshot(m) for m in models.values()] == before
    assert torch.equal(torch.get_rng_state(), random_state)
    for model in models.values():
        assert model.seen == {(True, False, False, False), (True, False, True, True)}


def test_time_network_gives_plain_seconds() -> None:
    fake = FakeTime()
    models = {"a": Timed(fake, "a", 4.0), "b": Timed(fake, "b", 3.0)}
    example = torch.randn(2, 3, 8, 8)
    pace = Pace(2, 0.0, fake.clock)
    assert time_network(models, example, pace=pace) == {"a": 4.0, "b": 3.0}
    last = time_network(models, example, "channels_last", pace)
    assert last == {"a": 2.0, "b": 1.5}


def test_networks_are_restored_when_one_fails() -> None:
    model = Timed(FakeTime(), "a", 1.0)
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        time_network_formats({"a": model}, torch.randn(1, 7, 8, 8), ("channels_last",), Pace(1))
    assert snapshot(model) == before
    assert not torch.is_inference_mode_enabled()


def test_real_networks_take_real_time() -> None:
    models = {"conv": nn.Conv2d(3, 8, 3), "linear": nn.Sequential(nn.Flatten(), nn.Linear(192, 4))}
    seconds = time_network(models, torch.randn(2, 3, 8, 8), pace=Pace(2, 0.0))
    assert seconds.keys() == models.keys()
    assert all(0 < s < math.inf for s in seconds.values())


def test_memory_format_is_put_on_and_taken_off() -> None:
    conv = nn.Conv2d(3, 4, 3)
    model = nn.Sequential(conv, nn.Conv2d(4, 2, 3), nn.Flatten())
    model.register_buffer("grid", torch.randn(1, 3, 5, 5))
    before = snapshot(model)
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    with in_memory_format(model, "channels_last") as inside:
        assert inside is model
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert not model[0].weight.is_contiguous()
        assert not model.grid.is_contiguous()
        torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected)
    assert snapshot(model) == before
    last = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = snapshot(last)
    with pytest.raises(RuntimeError), in_memory_format(last, "contiguous"):
        last(torch.randn(1, 7, 9, 9))  # seven channels
    assert snapshot(last) == before
    with pytest.raises(ValueError, match="'nhwc' is not one of contiguous, channels_last"):
        with in_memory_format(nn.Linear(2, 2), "nhwc"):
            pass


def test_a_shape_in_several_layers_is_measured_once() -> None:
    fake = FakeTime()
    table, setting = LatencyTable(), Setting.here()
    same = [Timed(fake, "same", 2.0) for _ in range(3)]
    other = Timed(fake, "other", 3.0)
    layers = [(same[0], (2, 3, 8, 8)), (other, (2, 3, 8, 8)), (same[1], (2, 3, 8, 8))]
    pace = Pace(3, 0.0, fake.clock)
    before = snapshot(same[0])
    assert table.time(layers, setting, pace) == [2.0, 3.0, 2.0]
    assert fake.calls.count("same") == fake.calls.count("other") == 5
    assert snapshot(same[0]) == before
    assert table.time([(same[2], (2, 3, 8, 8))], setting, pace) == [2.0]
    assert fake.calls.count("same") == 5
    assert table.time([(same[2], (4, 3, 8, 8))], setting, pace) == [2.0]
    last, before = Setting.here(memory_format="channels_last"), snapshot(same[2])
    assert table.time([(same[2], (2, 3, 8, 8))], last, pace) == [1.0]
    assert snapshot(same[2]) == before
    assert fake.calls.count("same") == 15
    assert len(table) == 4


def test_the_fastest_turn_of_a_layer_counts() -> None:
    """What else the machine does only adds to a time."""
    fake = FakeTime()
    delays = iter([0.0, 0.0, 5.0, 0.0, 7.0, 3.0])

    class Delayed(Timed):
        def forward(self, x: Any) -> Any:
            fake.now += next(delays)
            return super().forward(x)

    layer = Delayed(fake, "delayed", 2.0)
    pace = Pace(4, 0.0, fake.clock)
    assert LatencyTable().time([(layer, (2, 3, 8, 8))], Setting.here(), pace) == [2.0]


def test_a_tenth_of_the_turns_of_a_network_were_as_fast_as_its_undisturbed_time() -> None:
    fake = FakeTime()
    delays = iter([0.0, 0.0, *(float(d) for d in range(19, -1, -1))])

    class Delayed(Timed):
        def forward(self, x: Any) -> Any:
            fake.now += next(delays)
            return super().forward(x)

    models = {"delayed": Delayed(fake, "delayed", 2.0)}
    pace = Pace(20, 0.0, fake.clock)
    timing = time_network_formats(models, torch.zeros(1, 3, 8, 8), ("contiguous",), pace)
    found = timing["delayed", "contiguous"]
    assert (found.undisturbed, found.seconds) == (4.0, 11.5)
    assert Timing(3.0, 1, 1, "contiguous", 1).undisturbed == 3.0


def test_layers_are_told_apart_by_their_geometry() -> None:
    def chain(rank: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, rank, 3, stride, bias=False), nn.Conv2d(rank, 8, 1))

    described = [describe_layer(chain(2)), describe_layer(chain(3)), describe_layer(chain(2, 2))]
    assert len(set(described)) == 3
    assert describe_layer(chain(2)) == described[0]
    assert "\n" not in described[0]


def test_a_setting_is_that_of_this_process() -> None:
    setting = Setting.here("cpu", torch.float64, "channels_last")
    assert setting.dtype == "float64"
    assert setting.threads == torch.get_num_threads()
    assert setting.device_name
    table = LatencyTable()
    conv = nn.Conv2d(3, 4, 3, dtype=torch.float64)
    seconds = table.time([(conv, (1, 3, 5, 5))], setting, Pace(1, 0.0))
    assert seconds[0] > 0
    assert table.key(conv, (1, 3, 5, 5), setting) in table
    assert table.key(conv, (1, 3, 5, 5), Setting.here()) not in table
    assert table[table.key(conv, (1, 3, 5, 5), setting)] == seconds[0]
    other = Setting(**{**vars(setting), "threads": setting.threads + 1})
    with pytest.raises(ValueError, match="threads"):
        table.time([(conv, (1, 3, 5, 5))], other)


def test_a_table_survives_json(tmp_path: Path) -> None:
    fake = FakeTime()
    table, setting = LatencyTable(), Setting.here()
    layer = Timed(fake, "layer", 0.1 + 0.2)
    pace = Pace(1, 0.0, fake.clock)
    seconds = table.time([(layer, (1, 3, 4, 4))], setting, pace)
    path = tmp_path / "latency.json"
    path.write_text(table.to_json())
    again = LatencyTable.read(path)
    assert again.to_json() == table.to_json()
    fake.calls.clear()
    assert again.time([(layer, (1, 3, 4, 4))], setting, pace) == seconds
    assert fake.calls == []


def damaged(change: Any) -> str:
    table = LatencyTable()
    table.time([(nn.Linear(2, 2), (1, 2))], Setting.here(), Pace(1, 0.0))
    raw = json.loads(table.to_json())
    change(raw)
    raw.pop("sha256", None)
    return json.dumps(sealed_record(raw))  # what it says is checked as well


def test_no_flipped_bit_and_no_edited_table_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    table = LatencyTable()
    table.time([(nn.Linear(2, 2), (1, 2))], Setting.here(), Pace(1, 0.0))
    path.write_text(table.to_json())
    for _ in flipped(path, 1000):
        with suppress(InputError):  # a space that became another one is no damage
            assert LatencyTable.read(path).to_json() == table.to_json()
    raw = json.loads(table.to_json())
    raw["entries"][0]["seconds"] = 1e-9
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match=r"was damaged or edited since .*delete it to measure"):
        LatencyTable.read(path)
    del raw["sha256"]
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match="carries no digest"):
        LatencyTable.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(format=99), "format"),
        (lambda raw: raw.pop("entries"), "damaged"),
        (lambda raw: raw["entries"][0].pop("layer"), "damaged"),
        (lambda raw: raw["entries"][0].update(seconds="soon"), "damaged"),
        (lambda raw: raw["entries"][0].update(seconds=-1.0), "damaged"),
        (lambda raw: raw.update(entries=[3]), "damaged"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, change: Any, message: Any) -> None:
    path = tmp_path / "latency.json"
    path.write_text(damaged(change))
    with pytest.raises(InputError, match=message):
        LatencyTable.read(path)


def test_a_missing_or_foreign_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        LatencyTable.read(tmp_path / "none.json")
    path = tmp_path / "latency.json"
    path.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        LatencyTable.read(path)
    path.write_text("[]")
    with pytest.raises(InputError, match="not a latency table"):
        LatencyTable.read(path)
