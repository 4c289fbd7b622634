"""Modules by name: swapped for a while, and the type that most of their tensors have."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from compress.running.modules import dtype_of, swapped


def test_modules_come_back_whatever_happens() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    other = nn.Linear(2, 2)
    with swapped(model, {"0": other, "2": other}) as before:
        assert model[0] is model[2] is other
        assert set(before.values()) == {shared}
    assert model[0] is model[2] is shared
    with pytest.raises(RuntimeError), swapped(model, {"1": other}):
        raise RuntimeError
    assert isinstance(model[1], nn.ReLU)


def test_the_most_frequent_floating_type_and_the_first_of_equals() -> None:
    half, single, double = (
        torch.zeros(2, dtype=d) for d in (torch.half, torch.float, torch.double)
    )
    whole = torch.zeros(2, dtype=torch.long)
    assert dtype_of([half, single, single, whole, whole, whole]) == torch.float32
    assert dtype_of([]) == dtype_of([whole]) == torch.float32
    for order in itertools.permutations([half, single, double]):
        assert dtype_of(order) == order[0].dtype, "a tie goes to the type met first"
