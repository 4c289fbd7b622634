"""Which tensors are taken for a sign that training diverged."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compress.running.finite import not_finite

INF = math.inf


@pytest.mark.parametrize(
    ("tensor", "fine"),
    [
        (torch.tensor([1.0, 2.0]), True),
        (torch.full((4, 4), -INF).triu(1), True),  # what attention adds to hide what is to come
        (torch.tensor([1.0, -INF, 1.0], dtype=torch.bfloat16), True),
        (torch.tensor([0.5, 0.25, INF]), False),
        (torch.tensor([0.0, math.nan, 0.0]), False),
        (torch.tensor([0.0, math.nan, -INF]), False),
        (torch.tensor([INF, INF]), False),
        (torch.tensor([1, 2]), True),
    ],
)
def test_masks_may_hold_infinities(tensor: Tensor, fine: bool) -> None:
    assert not_finite({"fine": torch.zeros(2), "asked": tensor}) == (() if fine else ("asked",))
