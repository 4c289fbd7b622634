"""The dense baseline: which memory format it is calibrated in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.network.baseline import prepare


class Viewing(nn.Module):
    """Flattens by ``view``, which takes contiguous activations alone."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4 * 36, 5)
        self.method = method

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(getattr(self.conv(images), self.method)(len(images), -1))


@pytest.mark.parametrize(
    ("model", "example", "wanted"),
    [
        (Viewing("reshape"), torch.randn(1, 3, 8, 8), "channels_last"),
        (Viewing("view"), torch.randn(1, 3, 8, 8), "contiguous"),
        (nn.Linear(7, 3), torch.randn(1, 7), "contiguous"),
    ],
    ids=["reshape", "view", "no images"],
)
def test_the_baseline_runs_in_channels_last_where_it_can(
    model: nn.Module, example: Tensor, wanted: str
) -> None:
    network = prepare(model, example)
    assert network.memory_format == wanted
    assert all(p.is_contiguous() for p in network.model.parameters())
