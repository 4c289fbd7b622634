"""The variance of outputs, of which a batch may have another number of channels."""

from __future__ import annotations

import pytest
import torch

from compress.measure.spread import Spread


def test_the_variance_is_the_mean_over_channels() -> None:
    values = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    spread = Spread()
    for part in values.split(6):
        spread.see(part)
    expected = values.transpose(0, 1).flatten(1).var(1, correction=0).mean()
    assert spread.variance() == pytest.approx(float(expected))


def test_other_numbers_of_channels_count_as_one_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, n, 4, generator=generator).double() for n in (5, 7, 5)]
    spread = Spread()
    for part in parts:
        spread.see(part)
    together = torch.cat([part.flatten() for part in parts])
    assert spread.elements == len(together)
    assert spread.variance() == pytest.approx(float(together.var(correction=0)))
