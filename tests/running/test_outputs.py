"""What outputs are taken for, and that it is decided once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from compress.calibrate.fisher import Objective
from compress.errors import ModelError
from compress.running.outputs import Part, are_probabilities, read_outputs

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


def kinds(result: Any, targets: Any = (), *, sigmoid: bool = False) -> list[tuple[str, str, bool]]:
    reading = read_outputs(result, targets, sigmoid=sigmoid)
    return [(p.path, p.kind, reading.ranked) for p in reading.parts]


def test_probabilities_become_logits_again() -> None:
    softmax = LOGITS.softmax(1)
    assert are_probabilities(softmax)
    torch.testing.assert_close(read_outputs(softmax).scores(softmax).softmax(1), softmax)
    for left in (LOGITS, LOGITS.sigmoid(), LOGITS.abs() / 100):
        assert read_outputs(left).scores(left) is left
    answers = LOGITS.sigmoid()
    torch.testing.assert_close(Part("", "answers", True).logits(answers), LOGITS)


def test_a_probability_of_zero_stays_finite() -> None:
    sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert bool(torch.isfinite(read_outputs(sure).scores(sure)).all())
    assert bool(torch.isfinite(Part("", "answers", True).logits(sure)).all())


MASKS = list(torch.randint(0, 4, (6, 5, 5), generator=torch.Generator().manual_seed(1)))
MANY = list((LOGITS > 0).float())
ONE_HOT = list(torch.eye(4)[[0, 1, 2, 3, 0, 1]])


@pytest.mark.parametrize(
    ("result", "targets", "expected"),
    [
        (LOGITS, (), [("", "classes", True)]),
        (LOGITS, [0, 1, 2, 3, 0, -1], [("", "classes", True)]),
        (LOGITS, MANY, [("", "answers", False)]),
        (LOGITS, ONE_HOT, [("", "classes", True)]),
        (LOGITS, [torch.rand(3)] * 6, [("", "values", False)]),
        (LOGITS, [{"boxes": torch.rand(3, 4)}] * 6, [("", "values", False)]),
        (LOGITS[:, :1], [0, 1, 1, 0, 1, 0], [("", "values", False)]),
        (LOGITS[:, 0], [0.5] * 6, [("", "values", False)]),
        (torch.rand(6, 4, 5, 5), (), [("", "values", False)]),
        (torch.rand(6, 4, 5, 5), MASKS, [("", "classes", False)]),
        (torch.rand(6, 3, 5, 5), MASKS, [("", "values", False)]),  # a class beyond the outputs
        ({"out": LOGITS, "aux": LOGITS}, (), [("out", "classes", True)]),
        ((LOGITS, LOGITS.argmax(1)), (), [("[0]", "classes", True)]),
        ({"a": LOGITS, "b": [LOGITS]}, (), [("a", "values", False), ("b[0]", "values", False)]),
    ],
)  # fmt: skip
def test_what_outputs_stand_for(result: Any, targets: Any, expected: Any) -> None:
    assert kinds(result, targets) == expected


def test_a_sigmoid_gives_answers() -> None:
    assert kinds(LOGITS.sigmoid(), sigmoid=True)[0][1] == "answers"
    assert kinds(LOGITS.sigmoid()[:, :1], [0, 1, 1, 0, 1, 0], sigmoid=True)[0][1] == "answers"


def test_of_several_outputs_the_one_that_predicts_the_labels_is_the_logits() -> None:
    labels = torch.arange(40) % 4
    scores, boxes = torch.eye(4)[labels] + 0.1 * torch.rand(40, 4), torch.rand(40, 4)
    assert kinds((boxes, scores), labels.tolist()) == [("[1]", "classes", True)]
    # Where none does, or more than one, nobody guesses.
    assert len(kinds((boxes, torch.rand(40, 2)), labels.tolist())) == 2
    assert len(kinds((scores, scores), labels.tolist())) == 2


def test_of_several_values_each_counts_the_same() -> None:
    large, small = 1000 * LOGITS, LOGITS[:, :1]
    reading = read_outputs([large, small])
    for k, output in enumerate((large, small)):
        shifted = [large, small]
        # As far off as the output itself spreads.
        shifted[k] = output + output.std(correction=0)
        found = reading.divergence([large, small], shifted)
        torch.testing.assert_close(found, torch.full_like(found, 0.5))


def test_divergences_are_those_of_torch() -> None:
    other = LOGITS + torch.rand_like(LOGITS)
    found = Part("", "classes").divergence(LOGITS, other)
    expected = kl_divergence(Categorical(logits=LOGITS), Categorical(logits=other))
    torch.testing.assert_close(found, expected)
    found = Part("", "answers").divergence(LOGITS, other)
    expected = kl_divergence(Bernoulli(logits=LOGITS), Bernoulli(logits=other)).sum(1)
    torch.testing.assert_close(found, expected)
    found = Part("", "values").divergence(LOGITS, other)
    torch.testing.assert_close(found, 0.5 * (LOGITS - other).square().sum(1))


def test_outputs_that_change_their_structure() -> None:
    reading = read_outputs((LOGITS, LOGITS))
    with pytest.raises(ModelError, match="change with its input"):
        reading.outputs((LOGITS,))
    with pytest.raises(ModelError, match="no tensor holds real numbers"):
        read_outputs(LOGITS.argmax(1))


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
    signed = p.sqrt() * objective.signs[0].take(1, later)
    torch.testing.assert_close(gradients[1], signed - p * signed.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("result", "fisher"),
    [
        (LOGITS[:1], lambda z: torch.diag(z.softmax(0)) - z.softmax(0).outer(z.softmax(0))),
        (LOGITS[:1].sigmoid(), None),
    ],
)
def test_the_gradients_have_the_fisher_information_as_their_covariance(
    result: Tensor, fisher: Any
) -> None:
    """Of classes through the softmax; of answers, by the distributions of torch."""
    logits = LOGITS[0]
    reading = read_outputs(result, sigmoid=fisher is None)
    second = torch.zeros(4, 4, dtype=torch.float64)
    for seed in range(4000):
        leaf = logits.clone().requires_grad_()
        output = leaf.sigmoid() if fisher is None else leaf
        Objective(1, seed, reading=reading)(output[None], None).backward()
        assert leaf.grad is not None
        second += leaf.grad.outer(leaf.grad) / 4000
    expected = fisher(logits) if fisher else torch.diag(Bernoulli(logits=logits).variance)
    torch.testing.assert_close(second, expected, atol=0.02, rtol=0)
