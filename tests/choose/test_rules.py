"""Choosing ranks: rules, break-even, overrides, plans that are edited."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks.tiny import tiny
from shared_data import shared_path
from torch import nn

from compress.calibrate.collect import calibrate
from compress.calibrate.recipe import Recipe
from compress.calibrate.statistics import Calibration, Source
from compress.choose import Chooser, break_even, check_plan, scheme_cost
from compress.config import RunConfig, make_config
from compress.demo_data.network import width32
from compress.errors import BudgetError, ConfigError, PlanError
from compress.network.baseline import Network, prepare
from compress.network.sites import find_sites
from compress.plan import Plan, read_plan
from compress.rules.spectrum import rank_by_energy, rank_by_threshold

HAND_PICKED = {
    "conv1": "9", "conv2": "24", "conv3": "48", "conv4": "48", "conv5": "120", "conv6": "120",
}  # fmt: skip


@pytest.fixture(scope="module")
def network() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return prepare(tiny(), torch.rand(1, 1, 8, 8))


@pytest.fixture(scope="module")
def calibration(network: Network) -> Calibration:
    images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    batches = [(images, torch.zeros(32))]
    return calibrate(network.model, network.sites, batches, Source(32), Recipe(weigh=False))


def chosen(network: Network, calibration: Calibration, **given: object) -> Plan:
    config = make_config({"metric": "mse", **given})
    return Chooser(network.model, network.sites, calibration, config).plan()


@pytest.mark.shared
def test_the_threshold_rule_on_the_published_spectra() -> None:
    spectra = json.loads(shared_path("data", "mnist-width32-spectra.json").read_text())
    found = [rank_by_threshold(values, 1e-3) for values in _lists(spectra)]
    assert found == [7, 14, 17, 45, 40]


def _lists(value: object) -> list[list[float]]:
    if isinstance(value, list) and value and isinstance(value[0], int | float):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [found for part in parts for found in _lists(part)]


def test_hand_picked_ranks_and_what_they_cost() -> None:
    """The original experiment: six layers rewritten make the network larger, not smaller."""
    model = width32()
    sites = find_sites(model, torch.rand(1, 1, 28, 28))
    images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    calibration = calibrate(
        model, sites, [(images, torch.zeros(8))], Source(8), Recipe(weigh=False)
    )
    config = RunConfig(rank=HAND_PICKED, metric="mse")
    forced = Chooser(model, sites, calibration, config.replace(force_rank=True)).plan()
    assert [c.scheme for c in forced.choices] == ["output"] * 6 + ["dense"]
    params = [sum(getattr(c, k) for c in forced.choices) for k in ("dense_params", "params")]
    assert params == [205_802, 218_683]
    macs = [sum(getattr(c, k) for c in forced.choices) for k in ("dense_macs", "macs")]
    assert 1 - macs[1] / macs[0] == pytest.approx(0.131, abs=5e-4)
    own = Chooser(model, sites, calibration, config).plan()
    kept = [c.name for c in own.choices if not c.rewritten]
    assert kept == ["conv1", "conv5", "conv6", "head"]
    for name in ("conv1", "conv5", "conv6"):
        assert "beyond break-even" in own[name].reason
    assert sum(c.params for c in own.choices) < 205_802


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.integers(1, 12), st.integers(2, 24), st.sampled_from([1, 2, 3, 5]), st.integers(1, 2),
    st.booleans(),
)  # fmt: skip
def test_break_even_is_the_last_rank_that_saves(
    inputs: int, outputs: int, kernel: int, stride: int, by_macs: bool
) -> None:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)
    (site,) = find_sites(nn.Sequential(layer), torch.zeros(1, inputs, 7, 6))
    if site.skip is not None:
        return

    def cost(rank: int) -> int:
        # The output scheme, counted by hand: r (d + c_out) multiplications, r d + r c_out numbers.
        positions = -(-(7 + 2 * (kernel // 2) - kernel + 1) // stride)
        positions *= -(-(6 + 2 * (kernel // 2) - kernel + 1) // stride)
        numbers = rank * (inputs * kernel**2 + outputs)
        return numbers * positions if by_macs else numbers + outputs

    dense = site.macs if by_macs else site.params
    saving = [r for r in range(1, site.geometry.full_rank + 1) if cost(r) < dense]
    found = break_even(site, "output", lambda c: c.macs if by_macs else c.params)
    assert found == max(saving, default=0)


def test_ranks_follow_the_spectrum(network: Network, calibration: Calibration) -> None:
    for rule, choose in (("threshold", rank_by_threshold), ("energy", rank_by_energy)):
        value = {"threshold": 0.05, "energy": 0.9}[rule]
        plan = chosen(network, calibration, **{rule: value})
        for name in ("conv1", "conv2"):
            moments = calibration.statistics[name].outputs
            if moments is None:
                inputs = calibration.statistics[name].inputs
                assert inputs is not None
                weight = network.model.get_submodule(name).weight.detach().double().flatten(1)
                covariance = weight @ inputs.covariance[0] @ weight.T
            else:
                covariance = moments.covariance[0]
            values = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0).tolist()
            rank = choose(values, value)
            assert f"keeps {rank} of" in plan[name].reason
            assert plan[name].ranks in ((rank,), ())


def test_overrides_hold(network: Network, calibration: Calibration) -> None:
    plan = chosen(network, calibration, rank={"conv*": "2", "conv2": "3"})
    assert (plan["conv1"].ranks, plan["conv2"].ranks) == ((2,), (3,))
    assert plan["head"].reason == "no rank given"
    plan = chosen(network, calibration, energy=0.5, keep=("conv1",), scheme={"conv2": "dense"})
    assert not plan["conv1"].rewritten
    assert plan["conv2"].reason == "kept on request"
    plan = chosen(network, calibration, energy=0.5, round_to=4)
    assert all(c.ranks[0] % 4 == 0 for c in plan.choices if c.rewritten)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": ("conv3",)}, "matches no layer"),
        ({"rank": {"conv2": "3"}, "keep": ("conv2",)}, "both kept and given a rank"),
        ({"rank": {"conv2": "3,3"}, "scheme": {"conv2": "spatial"}}, "takes 1 rank"),
        ({"scheme": {"head": "input"}}, "cannot take 'input'"),
    ],
)
def test_contradictions_are_errors(
    network: Network, calibration: Calibration, given: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen(network, calibration, **given)


@pytest.mark.parametrize("rule", ["macs", "params"])
@pytest.mark.parametrize("fraction", [0.5, 0.75, 0.95])
def test_budgets_are_never_exceeded(
    network: Network, calibration: Calibration, rule: str, fraction: float
) -> None:
    plan = chosen(network, calibration, schemes=("output",), **{rule: fraction})
    before = sum(getattr(c, f"dense_{rule}") for c in plan.choices)
    after = sum(getattr(c, rule) for c in plan.choices)
    assert after <= fraction * before
    for choice in plan.choices:
        assert not choice.rewritten or getattr(choice, rule) < getattr(choice, f"dense_{rule}")


def test_the_smallest_reachable_budget_is_reachable(
    network: Network, calibration: Calibration
) -> None:
    with pytest.raises(BudgetError, match="smallest reachable") as caught:
        chosen(network, calibration, macs=1e-3, schemes=("output",))
    smallest = float(str(caught.value).partition("fraction is ")[2].split(". ")[0])
    plan = chosen(network, calibration, macs=smallest, schemes=("output",))
    before, after = (sum(getattr(c, k) for c in plan.choices) for k in ("dense_macs", "macs"))
    assert Fraction(after, before) <= Fraction(smallest)
    with pytest.raises(BudgetError):
        chosen(network, calibration, macs=smallest - 2e-4, schemes=("output",))


def test_an_edited_plan_is_costed_anew(
    network: Network, calibration: Calibration, tmp_path: Path
) -> None:
    plan = chosen(network, calibration, rank={"conv2": "3"})
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    assert check_plan(read_plan(file), network.sites, network.channels) == plan
    choices = (replace(c, ranks=(5,)) if c.name == "conv2" else c for c in plan.choices)
    file.write_text(replace(plan, choices=tuple(choices)).to_json())
    found = check_plan(read_plan(file), network.sites, network.channels)
    assert found["conv2"].macs == scheme_cost(network.site("conv2"), "output", (5,)).macs
    assert found["conv2"].macs == 36 * 5 * (72 + 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "8→13 3x3"}, "the plan has Conv2d 8→13 3x3, the model Conv2d 8→12 3x3"),
        ({"scheme": "outptu", "ranks": (1,)}, "Did you mean 'output'"),
        ({"scheme": "output", "ranks": (13,)}, "outside 1 to"),
        ({"scheme": "output", "ranks": (0,)}, "outside 1 to"),
        ({"scheme": "output", "ranks": (1, 1)}, "takes 1 rank"),
        ({"scheme": "dense", "ranks": (1,)}, "a dense layer has no ranks"),
        ({"name": "conv9"}, "no layer 'conv9' in the model; layer 'conv2' is missing"),
    ],
)
def test_plans_that_do_not_fit_say_why(
    network: Network, calibration: Calibration, change: dict[str, object], message: str
) -> None:
    plan = chosen(network, calibration, rank={"conv2": "3"})
    wrong = replace(plan["conv2"], **change)  # type: ignore[arg-type]
    choices = tuple(wrong if c.name == "conv2" else c for c in plan.choices)
    with pytest.raises(PlanError) as caught:
        check_plan(replace(plan, choices=choices), network.sites, network.channels)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rank", "wanted"),
    [
        ({"conv2": "5,11"}, (5, 11)),  # on no grid
        ({"conv2": "5"}, (5,)),
        ({"conv*": "7,7"}, (7, 7)),  # which other layers may not take
    ],
)
def test_ranks_by_hand_beside_a_budget_are_exactly_those(
    network: Network, rank: dict[str, str], wanted: tuple[int, ...]
) -> None:
    images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    recipe = Recipe(schemes=("output", "two_sided"), weigh=False)
    sites = network.sites
    patches = calibrate(network.model, sites, [(images, torch.zeros(32))], Source(32), recipe)
    plan = chosen(network, patches, macs=0.95, rank=rank, schemes=("output", "two_sided"))
    assert next(c for c in plan.choices if c.name == "conv2").ranks == wanted


def test_a_rank_by_hand_that_saves_nothing_is_passed_over_unless_forced(
    network: Network, calibration: Calibration
) -> None:
    full = next(s for s in network.sites if s.name == "conv2").geometry.full_rank
    given = {"rank": {"conv2": str(full)}, "schemes": ("output",)}
    plan = chosen(network, calibration, **given, macs=0.95)
    assert not next(c for c in plan.choices if c.name == "conv2").rewritten
    with pytest.raises(BudgetError, match=r"cannot be reached"):
        chosen(network, calibration, **given, macs=1.0, force_rank=True)
