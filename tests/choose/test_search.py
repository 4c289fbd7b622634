"""Searching the budget for a target drop."""

from __future__ import annotations

from typing import cast

import pytest

from compress.choose import Budgets
from compress.errors import ConfigError
from compress.pipeline.target_drop import cheapest_within_drop
from compress.plan import Choice


class Line:
    """Stands for budgets: the plan of a fraction is the fraction."""

    def smallest(self) -> float:
        return 0.1

    def spend(self, fraction: float) -> list[Choice]:
        return cast("list[Choice]", [fraction])


BUDGETS = cast(Budgets, Line())


@pytest.mark.parametrize("edge", [0.1, 0.33, 0.5, 0.97])
def test_bisection_comes_within_its_resolution_of_the_edge(edge: float) -> None:
    calls = []

    def drop(choices: list[Choice]) -> float:
        calls.append(choices)
        return 0.5 if cast(float, choices[0]) >= edge else 3.0

    found = cheapest_within_drop(BUDGETS, drop, 1.0)
    assert len(calls) == 8
    assert edge <= found.fraction <= edge + 0.9 / 2**8 + 1e-9
    assert found.drop == 0.5


def test_nothing_is_spared_where_every_budget_costs_too_much() -> None:
    found = cheapest_within_drop(BUDGETS, lambda _: 5.0, 1.0)
    assert found.fraction == 1.0
    assert found.choices == [1.0]
    assert found.drop == 0.0


def test_evaluations_are_needed() -> None:
    with pytest.raises(ConfigError, match="evaluation"):
        cheapest_within_drop(BUDGETS, lambda _: 0.0, 1.0, evaluations=0)
