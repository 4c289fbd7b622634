"""Groups of channels that the forward itself takes notice of are left."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from compress import compress_model
from compress.errors import ModelError
from compress.network.baseline import prepare
from compress.network.trial_cuts import REASON


class Asks(nn.Module):
    """Asks in several ways how many channels its middle layer gives."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 20, 3)
        self.head, self.how = nn.Linear(20, 4), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu()).relu()
        count = y.shape[1]
        y = {
            "": lambda: y,
            "equal": lambda: y - 0.5 if count == 24 else y,
            "scaled": lambda: y / math.sqrt(count),
            "named": lambda: y.reshape(len(y), 24, -1).unflatten(2, y.shape[2:]),
            "few": lambda: y * 2 if count < 7 else y,
        }[self.how]()
        return self.head(self.c(y).relu().mean((2, 3)))


@pytest.mark.parametrize("how", ["equal", "scaled"])
def test_a_group_is_left_whose_number_of_channels_is_asked_for(how: str) -> None:
    found = prepare(Asks(how).eval(), torch.rand(1, 3, 12, 12)).channels
    assert [group.name for group in found.groups] == ["a", "c"]
    assert len(found.members) == 2
    assert found.left["b"] == REASON


def test_other_groups_are_not() -> None:
    plain = prepare(Asks().eval(), torch.rand(1, 3, 12, 12)).channels
    assert [group.name for group in plain.groups] == ["a", "b", "c"]
    named = prepare(Asks("named").eval(), torch.rand(1, 3, 12, 12)).channels
    assert "b" in named.left
    assert named.left["b"] != REASON  # which is known without trying


def test_a_number_that_only_few_channels_reach_is_found_in_the_end() -> None:
    """None of the numbers tried is that small, but the one chosen is."""
    with pytest.raises(ModelError, match="does something else once"):
        compress_model(
            Asks("few"), torch.rand(24, 3, 12, 12), macs=0.15, schemes=("narrow",), metric="mse"
        )
