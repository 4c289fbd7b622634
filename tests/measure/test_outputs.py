"""Outputs compared where nothing says which of them counts."""

from __future__ import annotations

import torch

from compress.measure.outputs import Comparison
from compress.running.outputs import Reading


def test_without_an_output_that_counts_all_are_compared() -> None:
    """As of a detector in a file, whose boxes are as many for every image."""
    comparison = Comparison(Reading((), "", False))
    before = {"boxes": torch.rand(2, 5, 4), "scores": torch.rand(2, 5)}
    comparison.add(before, {k: t + 0.1 for k, t in before.items()})
    found = comparison.metric()
    assert found.images == 2
    assert {output.path for output in found.outputs} == {"boxes", "scores"}
    assert all(abs((output.mse or 0) - 0.01) < 1e-6 for output in found.outputs)
