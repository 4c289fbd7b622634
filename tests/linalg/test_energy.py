"""Distances between distributions, by the definition and where they are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compress.linalg.energy import energy_distance


def samples(count: int, dimensions: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))


def test_it_is_what_its_definition_says() -> None:
    x, y = samples(7, 3), 2 * samples(7, 3, 1) + 1
    spread = x.double().std(0)

    def mean(a: Tensor, b: Tensor) -> float:
        between = [
            float(((a[i].double() - b[j].double()) / spread).norm())
            for i in range(7)
            for j in range(7)
            if i != j
        ]
        return sum(between) / len(between)

    wanted = (2 * mean(x, y) - mean(x, x) - mean(y, y)) / mean(x, x)
    assert energy_distance(x, y) == pytest.approx(wanted, rel=1e-9)


def test_pairs_may_have_much_to_do_with_each_other() -> None:
    x = samples(100, 4)
    assert energy_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert abs(energy_distance(x, x + 0.01 * samples(100, 4, 1))) < 1e-3
    assert abs(energy_distance(x, -x)) < 0.01


def test_other_distributions_are_apart() -> None:
    x = samples(100, 4)
    assert energy_distance(x, x + 1) > 0.1
    assert energy_distance(x, x / 2) > 0.05
    # Only together are these two dimensions different.
    shared = torch.cat([x[:, :2], x[:, :2]], 1)
    assert energy_distance(x, shared) > 0.02


def test_what_never_changes_says_nothing() -> None:
    x = samples(20, 3)
    still = torch.cat([x, torch.full((20, 2), 3.0)], 1)
    other = torch.cat([x + 1, torch.full((20, 2), 5.0)], 1)
    assert energy_distance(still, other) == pytest.approx(energy_distance(x, x + 1))
    assert energy_distance(torch.ones(4, 2), torch.ones(4, 2)) == 0
    assert energy_distance(torch.ones(4, 2), torch.zeros(4, 2)) == math.inf
