"""The allocator against brute force, and the rank rules against the published ranks."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import SHARED

from compress.choose.knapsack import UnreachableBudgetError, allocate, frontier
from compress.errors import BudgetError, CalibrationError
from compress.plan import Candidate
from compress.rules.spectrum import rank_by_energy, rank_by_threshold

SPECTRA = SHARED / "data" / "mnist-width32-spectra.json"


def candidate(loss: float, macs: int, seconds: float | None = None) -> Candidate:
    return Candidate("output", (1,), loss=loss, macs=macs, params=0, seconds=seconds)


def macs(option: Candidate) -> float:
    return option.macs


def totals(options: Any, picks: Any) -> Any:
    chosen = [layer[i] for layer, i in zip(options, picks, strict=True)]
    return sum(c.macs for c in chosen), math.fsum(c.loss for c in chosen)


def brute_force(options: Any, budget: Any) -> Any:
    """Return the least loss within the budget by looking at every combination."""
    points = [totals(options, p) for p in itertools.product(*(range(len(o)) for o in options))]
    return min((loss for cost, loss in points if cost <= budget), default=None)


# Losses are multiples of 1/8, so that sums are exact and ties are frequent.
layers = st.lists(
    st.lists(
        st.builds(
            lambda loss, cost: candidate(loss / 8, cost), st.integers(0, 80), st.integers(0, 30)
        ),
        min_size=1,
        max_size=6,
    ),
    min_size=1,
    max_size=5,
)


def test_nothing_to_choose_from() -> None:
    assert allocate([], 0, macs) == []
    with pytest.raises(UnreachableBudgetError, match="costs at most -1"):
        allocate([], -1, macs)


@settings(derandomize=True, deadline=None, max_examples=250)
@given(layers, st.integers(0, 120))
def test_allocate_is_optimal_on_small_problems(options: Any, budget: Any) -> None:
    best = brute_force(options, budget)
    if best is None:
        with pytest.raises(UnreachableBudgetError) as caught:
            allocate(options, budget, macs)
        assert caught.value.smallest == sum(min(c.macs for c in layer) for layer in options)
        assert f"{caught.value.smallest:.10g}" in str(caught.value)
        return
    picks = allocate(options, budget, macs)
    cost, loss = totals(options, picks)
    assert cost <= budget
    assert loss == best
    assert picks == allocate(options, budget, macs)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(layers)
def test_a_larger_budget_never_loses_more(options: Any) -> None:
    smallest = sum(min(c.macs for c in layer) for layer in options)
    losses = [totals(options, allocate(options, smallest + b, macs))[1] for b in range(0, 60, 3)]
    assert losses == sorted(losses, reverse=True)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.lists(
        st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1e-3)), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    ),
    st.floats(0, 1),
)
def test_measured_seconds_as_cost(raw: Any, fraction: Any) -> None:
    options = [[candidate(loss, 0, seconds) for loss, seconds in layer] for layer in raw]

    def seconds(option: Candidate) -> float:
        assert option.seconds is not None
        return option.seconds

    low, high = (
        math.fsum(pick(c.seconds or 0.0 for c in layer) for layer in options) for pick in (min, max)
    )
    budget = low + fraction * (high - low)
    picks = allocate(options, budget, seconds)
    chosen = [layer[i] for layer, i in zip(options, picks, strict=True)]
    assert math.fsum(c.seconds for c in chosen) <= budget
    inside = budget * (1 - 1e-9)
    best = min(
        (
            math.fsum(c.loss for c in combination)
            for combination in itertools.product(*options)
            if math.fsum(c.seconds for c in combination) <= inside
        ),
        default=math.inf,
    )
    assert math.fsum(c.loss for c in chosen) <= best + 1e-12


def network(seed: int, number: int, size: int) -> list[list[Candidate]]:
    """Make layers whose loss falls about exponentially with cost, with noise and a dense choice."""
    generator = np.random.default_rng(seed)
    options = []
    for _ in range(number):
        dense, scale = int(generator.integers(10**5, 10**8)), float(np.exp(generator.normal()))
        share = generator.uniform(0.02, 1.2, size)
        loss = scale * np.exp(-6 * share + 0.1 * generator.normal(size=size))
        layer = [candidate(float(v), int(s * dense)) for v, s in zip(loss, share, strict=True)]
        options.append([*layer, candidate(0.0, dense)])
    return options


def test_a_large_network_is_within_budget_near_the_bound_and_monotone() -> None:
    options = network(0, 60, 200)
    dense = sum(layer[-1].macs for layer in options)
    corners = frontier(options, macs)
    losses = []
    for fraction in (0.1, 0.3, 0.5, 0.5001, 0.65, 0.8, 1.0):
        cost, loss = totals(options, allocate(options, fraction * dense, macs))
        assert cost <= fraction * dense
        # The relaxation's bound: the hull of the frontier, interpolated at the budget.
        bound = np.interp(fraction * dense, [c[0] for c in corners], [c[1] for c in corners])
        assert bound - 1e-9 <= loss <= bound + 1e-3 * corners[0][1]
        losses.append(loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0


@pytest.mark.parametrize("budget_share", [0.2, 0.5, 0.8])
def test_many_equal_and_near_equal_choices_stay_within_budget(budget_share: Any) -> None:
    generator = np.random.default_rng(1)
    costs = generator.integers(1, 10**6, (20, 60))
    options = [
        [candidate(100 - c / 1e4 + 0.1 * generator.random(), int(c)) for c in row] for row in costs
    ]
    budget = budget_share * sum(int(row.max()) for row in costs)
    cost, loss = totals(options, allocate(options, budget, macs))
    corners = frontier(options, macs)
    bound = np.interp(budget, [c[0] for c in corners], [c[1] for c in corners])
    assert cost <= budget
    assert bound - 1e-9 <= loss <= bound + 0.05


def test_an_exact_fit_is_found() -> None:
    options = [[candidate(4, 1), candidate(0, 6)], [candidate(4, 1), candidate(1, 4)]]
    assert allocate(options, 10, macs) == [1, 1]
    assert allocate(options, 9, macs) == [1, 0]
    assert allocate(options, 2, macs) == [0, 0]


def test_what_the_hull_leaves_is_filled() -> None:
    # The middle candidate lies above the hull of its layer, so that no multiplier selects it.
    options = [[candidate(10, 0), candidate(6, 5), candidate(0, 10)]]
    assert [picks for _, _, picks in frontier(options, macs)] == [[0], [2]]
    assert allocate(options, 7, macs) == [1]


def test_ties_go_to_the_cheaper_then_the_first() -> None:
    options = [[candidate(1, 5), candidate(1, 3), candidate(1, 3), candidate(2, 0)]]
    assert allocate(options, 100, macs) == [1]


def test_zero_costs_and_no_layers() -> None:
    assert allocate([[candidate(2, 0), candidate(1, 0)]], 0, macs) == [1]
    assert allocate([], 0, macs) == []
    assert frontier([], macs) == []


@settings(derandomize=True, deadline=None, max_examples=60)
@given(layers)
def test_frontier_is_the_hull_of_all_choices(options: Any) -> None:
    corners = frontier(options, macs)
    points = [totals(options, p) for p in itertools.product(*(range(len(o)) for o in options))]
    assert corners[0][0] == min(cost for cost, _ in points)
    assert corners[-1][1] == min(loss for _, loss in points)
    for cost, loss, picks in corners:
        assert totals(options, picks) == (cost, loss)
    costs, losses = [c[0] for c in corners], [c[1] for c in corners]
    assert costs == sorted(set(costs))
    assert losses == sorted(set(losses), reverse=True)
    for cost, loss in points:
        assert loss >= np.interp(cost, costs, losses) - 1e-9


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_refused(loss: Any) -> None:
    with pytest.raises(CalibrationError, match="layer 1"):
        allocate([[candidate(0, 1)], [candidate(loss, 1)]], 10, macs)


@pytest.mark.parametrize("price", [math.inf, math.nan, -1.0])
def test_a_cost_that_is_no_price_is_refused(price: Any) -> None:
    with pytest.raises(ValueError, match="layer 0"):
        allocate([[candidate(0, 1)]], 10, lambda _: price)


def test_budgets_and_layers_that_make_no_sense() -> None:
    with pytest.raises(BudgetError, match="finite"):
        allocate([[candidate(0, 1)]], math.nan, macs)
    with pytest.raises(ValueError, match="layer 1 has no candidates"):
        allocate([[candidate(0, 1)], []], 10, macs)


def test_threshold_counts_against_the_largest() -> None:
    eigenvalues = [1.0, 0.5, 1e-3, 0.999e-3, -1e-12]
    assert rank_by_threshold(eigenvalues, 1e-3) == 3
    assert rank_by_threshold(eigenvalues[::-1], 1e-3) == 3
    assert rank_by_threshold(eigenvalues, 1.0) == 1
    assert rank_by_threshold(eigenvalues, 0.0) == 5
    assert rank_by_threshold([3e-20 * e for e in eigenvalues], 1e-3) == 3


@pytest.mark.parametrize("rule", [rank_by_threshold, rank_by_energy])
def test_a_spectrum_that_is_numerically_zero_has_rank_one(rule: Any) -> None:
    assert rule([0.0, 0.0, -1e-30], 0.5) == 1
    assert rule([1e-17, 1e-17], 1.0, floor=1e-16) == 1
    assert rule([1e-17, 1e-17], 1.0) == 2


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12), st.integers(0, 16))
def test_energy_is_the_smallest_rank_that_reaches_it(values: Any, sixteenths: Any) -> None:
    values = sorted(values, reverse=True)
    wanted = sixteenths * sum(values)
    by_hand = next(r for r in range(1, len(values) + 1) if 16 * sum(values[:r]) >= wanted)
    assert rank_by_energy([v / 1024 for v in values], sixteenths / 16) == by_hand


def test_all_the_energy_is_not_undone_by_rounding() -> None:
    assert rank_by_energy([0.1] * 10 + [0.0] * 5, 1.0) == 10
    assert rank_by_energy([1.0, 1e-3, 1e-18, -1e-18], 1.0) == 2
    assert rank_by_energy([0.7, 0.2, 0.1], 0.9) == 2


@pytest.mark.parametrize("rule", [rank_by_threshold, rank_by_energy])
def test_rank_rules_refuse_nonsense(rule: Any) -> None:
    with pytest.raises(ValueError, match="outside"):
        rule([1.0], 1.5)
    with pytest.raises(ValueError, match="at least one"):
        rule([], 0.5)
    with pytest.raises(CalibrationError, match="not finite"):
        rule([1.0, math.nan], 0.5)


@pytest.mark.parametrize("kept", [7, 14, 17, 45, 40])
def test_threshold_keeps_the_published_counts_on_made_spectra(kept: Any) -> None:
    spectrum = [0.7 * 10 ** (-3 * i / (kept - 0.5)) for i in range(2 * kept)]
    assert rank_by_threshold(spectrum, 1e-3) == kept


@pytest.mark.shared
def test_threshold_keeps_the_published_counts() -> None:
    if not SPECTRA.exists():
        pytest.skip("the published spectra are not beside this checkout")
    spectra = json.loads(SPECTRA.read_text())["spectra"]
    ranks = [rank_by_threshold(spectra[f"layer{i}"], 1e-3) for i in range(2, 7)]
    assert ranks == [7, 14, 17, 45, 40]
