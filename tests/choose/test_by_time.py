"""Choosing by real time: timed candidates, rounding, the search over whole networks."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from stopwatch import stop_the_clock
from torch import Tensor, nn
from workbench import Workbench, paragraph

from compress.artefact.manifest import read_manifest
from compress.choose import Budgets, problems
from compress.choose.by_time.candidates import TimedBudgets, thinned, timed_candidates
from compress.choose.by_time.rounding import fastest_multiple
from compress.choose.by_time.search import slowest_within
from compress.choose.overrides import Overrides
from compress.config import RunConfig
from compress.deploy.engines import Engine
from compress.errors import BudgetError
from compress.network.chains import random_chain
from compress.network.sites import find_sites
from compress.plan import Candidate, Choice
from compress.rules.latency import BY_TIME
from compress.running.forward import forward_hooks
from compress.timing.layers import LatencyTable, LayerTimer, Setting
from compress.timing.networks import Timing
from compress.timing.turns import Pace


class ParameterTable(LatencyTable):
    """A device on which a parameter costs a microsecond, times the images."""

    def time(self, layers: Any, *_: Any, **__: Any) -> list[float]:
        return [1e-6 * shape[0] * parameters(module) for module, shape in layers]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def parameters_cost_time(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    del bench  # which stops the clock, and has to do so first

    def by_parameters(models: Any, images: Tensor, formats: Any, *_: Any, **__: Any) -> Any:
        return {
            (name, form): Timing(1e-6 * len(images) * parameters(model), 1, len(images), form, 1)
            for name, model in models.items()
            for form in formats
        }

    monkeypatch.setattr("compress.choose.by_time.plan.time_network_formats", by_parameters)
    monkeypatch.setattr("compress.choose.by_time.plan.LatencyTable", ParameterTable)
    monkeypatch.setattr("compress.measure.speed.time_network_formats", by_parameters)


class Layers(nn.Module):
    """Every kind of layer, a shared one, windows folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.line = nn.Conv1d(8, 8, 3, padding=1)
        self.tokens = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.conv(x))
        x = self.shared(torch.relu(self.shared(x[:, :, ::2])))
        windows = x.reshape(2 * len(x), 8, -1)
        x = self.line(windows).reshape(len(x), 8, -1)
        return self.head(self.tokens(x.mT).mean(1))


def test_input_shapes_are_those_that_occur() -> None:
    model = Layers().eval()
    seen: dict[nn.Module, list[tuple[int, ...]]] = {}
    sites = find_sites(model, torch.randn(1, 3, 6, 8))

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        seen.setdefault(module, []).append(tuple(inputs[0].shape))

    modules = dict(model.named_modules())
    with forward_hooks({modules[site.name]: note for site in sites}):
        model(torch.randn(5, 3, 6, 8))
    assert len(sites) == 6
    for site in sites:
        assert [site.input_shape(c, 5) for c in site.calls] == seen[modules[site.name]]


def test_candidates_cost_what_all_their_calls_take() -> None:
    model = Layers().eval()
    sites = find_sites(model, torch.randn(1, 3, 6, 8))
    shared = next(s for s in sites if s.name == "shared")
    dense = Candidate("dense", (), 0.0, shared.macs, shared.params)
    small = Candidate("output", (2,), 0.5, 10, 20)
    setting = Setting.here()
    seconds, timed = timed_candidates(
        model, sites, {"shared": [dense, small]}, (LayerTimer(ParameterTable(), setting, 4), Pace())
    )
    weights = 8 * 8 * 9 + 8
    assert seconds == {"shared": pytest.approx(2 * 4e-6 * weights)}
    assert [c.seconds for c in timed["shared"]] == [
        pytest.approx(2 * 4e-6 * weights),
        pytest.approx(2 * 4e-6 * (8 * 9 * 2 + 2 * 8 + 8)),
    ]
    assert [(c.scheme, c.ranks, c.loss) for c in timed["shared"]] == [
        ("dense", (), 0.0), ("output", (2,), 0.5),
    ]  # fmt: skip
    # Ranks that the user fixed leave no dense candidate, and none is put in.
    _, fixed = timed_candidates(
        model, sites, {"shared": [small]}, (LayerTimer(ParameterTable(), setting, 4), Pace())
    )
    assert [c.scheme for c in fixed["shared"]] == ["output"]


def test_a_random_chain_keeps_activations_in_scale() -> None:
    layer = nn.Conv2d(64, 64, 3, padding=1)
    state = torch.get_rng_state()
    site = find_sites(layer, torch.randn(1, 64, 8, 8))[0]
    torch.set_rng_state(state)
    chain = random_chain(site.geometry, "two_sided", (20, 30), layer)
    assert torch.equal(torch.get_rng_state(), state)
    out = chain(torch.randn(2, 64, 8, 8)).detach()
    assert out.shape == (2, 64, 8, 8)
    assert 0.3 < float(out.std()) < 3


def test_thinning_keeps_the_best_at_each_cost_of_every_scheme() -> None:
    found = [Candidate("dense", (), 0.0, 1000, 0)]
    found += [Candidate("output", (r,), 1 / r, 10 * r, 0) for r in range(1, 91)]
    found += [
        Candidate("two_sided", (a, b), 1 / a + 1 / b, a * b, 0)
        for a in range(1, 21)
        for b in range(1, 21)
    ]
    kept = thinned(found, 5)
    assert kept[0] == found[0]
    output = [c.ranks[0] for c in kept if c.scheme == "output"]
    assert output == [1, 23, 45, 68, 90] or output == [1, 23, 46, 68, 90]
    pairs = [c for c in kept if c.scheme == "two_sided"]
    assert len(pairs) == 5
    for one in pairs:
        better = [
            c for c in found
            if c.scheme == "two_sided" and c.macs <= one.macs and c.loss < one.loss
        ]  # fmt: skip
        assert not better


@dataclass
class SteppedTable(LatencyTable):
    """A device that computes ranks in blocks."""

    block: int = 8
    asked: list[int] = field(default_factory=list)

    def time(self, layers: Any, *_: Any, **__: Any) -> list[float]:
        ranks = [module[0].weight.shape[0] for module, _ in layers]
        self.asked += ranks
        return [float(math.ceil(r / self.block) * self.block) for r in ranks]


@pytest.mark.parametrize("block", [1, 4, 8, 16])
def test_ranks_are_rounded_to_what_the_device_computes_anyway(block: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 128, 3), nn.Conv2d(128, 128, 3)).eval()
    sites = find_sites(model, torch.randn(1, 3, 12, 12))
    table = SteppedTable(block=block)
    assert fastest_multiple(model, sites, LayerTimer(table, Setting.here(), 2)) == block
    assert max(table.asked) % 16 == 0


def test_narrow_layers_are_not_rounded() -> None:
    model = nn.Conv2d(3, 8, 3).eval()
    sites = find_sites(model, torch.randn(1, 3, 12, 12))
    assert fastest_multiple(model, sites, LayerTimer(SteppedTable(), Setting.here(), 2)) == 1


def timed_budgets(
    seconds: Sequence[float], total: float, memory_format: str = "contiguous", worth: float = 1.0
) -> TimedBudgets:
    """One layer whose candidates take these seconds, the dense one first; the faster, the worse."""
    layer = nn.Conv2d(16, 16, 3)
    sites = find_sites(layer, torch.randn(1, 16, 6, 6))
    found = [Candidate("dense", (), 0.0, sites[0].macs, sites[0].params, seconds[0])]
    found += [
        Candidate("output", (rank,), worth * (seconds[0] - s) ** 2, 10 * rank, 0, s)
        for rank, s in zip(range(len(seconds), 0, -1), seconds[1:], strict=False)
    ]
    overrides = Overrides(RunConfig(), sites)
    fixed = total - seconds[0]
    budgets = Budgets(sites, overrides, {"": found}, BY_TIME, total, fixed, "best within latency")
    return TimedBudgets(budgets, {"": seconds[0]}, memory_format)


def test_a_budget_of_time_takes_the_best_that_is_fast_enough_and_says_why() -> None:
    budgets = timed_budgets([4.0, 3.0, 2.0, 1.0, 0.5], total=10.0)
    assert budgets.budgets.fixed == 6.0
    assert budgets.smallest() == pytest.approx(0.65)
    made = budgets.spend(0.85)[0]
    assert (made.scheme, made.seconds, made.dense_seconds) == ("output", 2.0, 4.0)
    assert budgets.loss([made]) == 4.0
    left = budgets.spend(1.0)[0]
    assert (left.scheme, left.seconds) == ("dense", 4.0)
    assert "saves time" in left.reason
    with pytest.raises(BudgetError, match="latency"):
        budgets.spend(0.6)
    slow = timed_budgets([4.0, 5.0, 4.4], total=10.0).spend(1.0)[0]
    assert slow.scheme == "dense"
    assert "fastest takes 1.10 of the layer's time" in slow.reason


def stopwatch(
    truth: Callable[[float], float], log: list[float]
) -> Callable[[list[Choice], str], float]:
    def measure(choices: list[Choice], _: str) -> float:
        log.append(truth(cast(float, choices[0].seconds)))
        return log[-1]

    return measure


SECONDS = [100.0, *(float(s) for s in range(99, 0, -1))]


@pytest.mark.parametrize(
    "truth",
    [
        lambda s: s / 100,
        lambda s: 0.2 + 0.8 * s / 100,
        lambda s: (s / 100) ** 0.5,
        lambda s: (s / 100) ** 2,
        lambda s: math.ceil(s / 7) * 0.07,
    ],
    ids=["as predicted", "with overhead", "concave", "convex", "in steps"],
)
@pytest.mark.parametrize("fraction", [0.4, 0.6, 0.9])
def test_the_search_keeps_the_measured_budget_and_comes_close(
    truth: Callable[[float], float], fraction: float
) -> None:
    log: list[float] = []
    found = slowest_within([timed_budgets(SECONDS, 100.0)], stopwatch(truth, log), fraction)
    assert found.ratio in log
    assert found.trials <= 7
    assert len(log) <= 14
    assert 0.85 * fraction <= found.ratio <= fraction


def test_what_was_fast_enough_by_luck_is_not_taken() -> None:
    """The first measurement of every network comes out a tenth too short, the second does not."""
    seen: set[float] = set()

    def measure(choices: list[Choice], _: str) -> float:
        seconds = cast(float, choices[0].seconds)
        lucky = seconds not in seen
        seen.add(seconds)
        return (0.9 if lucky else 1.0) * seconds / 100

    found = slowest_within([timed_budgets(SECONDS, 100.0)], measure, 0.6)
    assert found.ratio == cast(float, found.choices[0].seconds) / 100
    assert 0.85 * 0.6 <= found.ratio <= 0.98 * 0.6


def test_barely_within_the_budget_is_better_than_nothing() -> None:
    found = slowest_within([timed_budgets(SECONDS, 100.0)], lambda *_: 0.595, 0.6)
    assert found.ratio == 0.595


def test_what_cannot_be_reached_is_named() -> None:
    log: list[float] = []
    with pytest.raises(BudgetError, match=r"still takes 0\.71 "):
        slowest_within(
            [timed_budgets(SECONDS, 100.0)], stopwatch(lambda s: 0.7 + s / 100, log), 0.6
        )
    assert log[-1] == min(log)


def test_the_memory_format_that_costs_less_accuracy_is_taken() -> None:
    slow = timed_budgets([100.0, 80.0, 60.0, 40.0, 20.0], 100.0)
    fast = timed_budgets([80.0, 60.0, 40.0, 30.0, 10.0], 80.0, "channels_last", worth=0.1)
    found = slowest_within([slow, fast], lambda c, _: cast(float, c[0].seconds) / 80, 0.6)
    assert found.memory_format == "channels_last"
    assert found.choices[0].seconds == 40.0


@pytest.mark.usefixtures("parameters_cost_time")
def test_a_run_keeps_its_time(bench: Workbench) -> None:
    table = bench.folder / "times.json"
    assert bench.run("--latency", "0.6", "--latency-table", str(table)).exit_code == 0
    result = bench.report()["result"]
    assert (result["rule"], result["value"]) == ("latency", 0.6)
    assert {x["ratio"] <= 0.6 for x in result["cost"]["latency"]} == {True}
    rewritten = [x for x in result["layers"] if x["scheme"] != "dense"]
    assert rewritten
    assert all(x["seconds"] < x["dense_seconds"] for x in rewritten)
    assert "entries" in json.loads(table.read_text())
    plan = json.loads((bench.output() / "plan.json").read_text())
    assert plan["rule"] == "latency"
    assert "latency_table" not in read_manifest(bench.output()).settings  # a path
    again = bench.run(
        "--latency", "0.6", "--latency-table", str(table), output=str(bench.output("b"))
    )
    assert again.exit_code == 0


@pytest.mark.usefixtures("parameters_cost_time")
def test_a_budget_is_spent_on_the_runtime_asked_for(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Noting(Engine):
        """A runtime that runs networks as torch does, and notes which."""

        def network(self, model: nn.Module, batches: Sequence[Any]) -> nn.Module:
            noted.append((len(batches[0]), sum(p.numel() for p in model.parameters())))
            return model

    noted: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "compress.pipeline.planning.engine_named", lambda *_: Noting("onnxruntime", "1.2")
    )
    table = bench.folder / "times.json"
    flags = ("--runtime", "onnxruntime", "--latency-batch", "3", "--latency-table", str(table))
    assert bench.run("--latency", "0.6", *flags).exit_code == 0
    (dense_batch, dense), *smaller = noted
    assert dense_batch == 3
    assert smaller
    assert all(batch == 3 and size < dense for batch, size in smaller)
    # What is measured again is not built again.
    assert all(one != other for one, other in itertools.pairwise(smaller))
    cost = bench.report()["result"]["cost"]
    assert {row["runtime"] for row in cost["latency"]} == {"onnxruntime"}
    assert "torch" in {row["runtime"] for row in cost["beside"]}


@pytest.mark.usefixtures("parameters_cost_time")
def test_ranks_given_by_hand_stay_though_others_are_rounded(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.choose.by_time.plan.fastest_multiple", lambda *_: 4)
    assert bench.run("--latency", "0.9", "--rank", "conv2=3", "--no-refit").exit_code == 0
    layers = {x["name"]: x for x in bench.report()["result"]["layers"]}
    assert layers["conv2"]["ranks"] == [3]


@pytest.mark.usefixtures("parameters_cost_time")
def test_the_budget_is_spent_in_the_metric_of_the_fits(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def noted(*arguments: Any, **settings: Any) -> Any:
        asked.append(settings)
        return problems(*arguments, **settings)

    monkeypatch.setattr("compress.choose.by_time.plan.problems", noted)
    assert bench.run("--latency", "0.6", "--no-refit").exit_code == 0
    assert asked == [{"fitted": True}]


@pytest.mark.usefixtures("parameters_cost_time")
def test_a_time_that_no_plan_takes_is_a_usage_error(bench: Workbench) -> None:
    text = paragraph(bench.run("--latency", "0.01"), 2)
    assert "--latency 0.01 cannot be reached" in text
    assert "of the time of the dense network" in text
    assert bench.leftovers() == []


@pytest.mark.usefixtures("parameters_cost_time")
def test_a_budget_that_the_fitted_network_misses_is_said(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_the_clock(monkeypatch, dense=0.01, compressed=0.009)
    done = bench.run("--latency", "0.6")
    assert done.exit_code == 0
    assert "0.900 of the dense network's time, over the budget of 0.6" in done.stdout
