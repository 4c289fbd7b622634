"""What outputs are taken for, and that it is decided once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.calibrate.fisher import Objective
from compress.running.outputs import are_class_scores, are_probabilities, to_logits

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


def test_probabilities_become_logits_again() -> None:
    softmax = LOGITS.softmax(1)
    assert are_probabilities(softmax)
    torch.testing.assert_close(to_logits(softmax)(softmax).softmax(1), softmax)
    for left in (LOGITS, LOGITS.sigmoid(), LOGITS.abs() / 100):
        assert to_logits(left)(left) is left


def test_a_probability_of_zero_stays_finite() -> None:
    sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert bool(torch.isfinite(to_logits(sure)(sure)).all())


@pytest.mark.parametrize(
    "output", [torch.rand(3), torch.rand(3, 1), torch.rand(3, 4, 2), torch.ones(3, 4).long()]
)
def test_other_outputs_are_left_alone(output: Tensor) -> None:
    assert not are_probabilities(output)
    assert to_logits(output)(output) is output
    assert are_class_scores(output) == (output.dim() == 2 and output.shape[1] > 1)


def test_the_first_batch_decides_for_all() -> None:
    """Logits that happen to add up to 1 in a later batch are no probabilities."""
    later = torch.tensor([[0.2, 0.5, 0.3]])
    objective, gradients = Objective(2, seed=0), []
    for output in (torch.tensor([[-1.0, 2.0, 0.5]]), later):
        leaf = output.clone().requires_grad_()
        objective(leaf, torch.zeros(1)).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    p = later.softmax(1)
    signed = p.sqrt() * objective.signs.take(1, later)
    torch.testing.assert_close(gradients[1], signed - p * signed.sum(1, keepdim=True))
