"""Steps by Adam and along orthogonalised momentum, beside what torch and singular values say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from compress.linalg.steps import (
    ALIKE,
    FIRST,
    MOMENTUM,
    QUINTIC,
    SECOND,
    TURNS,
    Steps,
    orthogonal,
)


def test_steps_are_adams_relative_to_each_tensors_size() -> None:
    generator = torch.Generator().manual_seed(0)
    start = {
        "a": torch.randn(5, 3, generator=generator),
        "b": 10 * torch.randn(4, generator=generator),
    }
    slopes = [
        {n: torch.randn(w.shape, generator=generator) for n, w in start.items()} for _ in range(6)
    ]
    ours = {n: nn.Parameter(w.clone()) for n, w in start.items()}
    theirs = {n: nn.Parameter(w.clone()) for n, w in start.items()}
    steps = Steps.begin(ours)
    adam = torch.optim.Adam(
        [{"params": [p], "lr": 0.02 * float(start[n].norm()) / start[n].numel() ** 0.5}
         for n, p in theirs.items()],
        betas=(FIRST, SECOND), eps=1e-12,
    )  # fmt: skip
    for gradients in slopes:
        for name, gradient in gradients.items():
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        assert steps.step(0.02)
        adam.step()
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name], rtol=1e-4, atol=1e-6)


def _by_singular_values(matrix: Tensor) -> Tensor:
    """What orthogonalising makes of a matrix, worked out on its singular values one by one."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values /= values.norm()
    a, b, c = QUINTIC
    for _ in range(TURNS):
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)])
def test_orthogonalising_keeps_directions_and_makes_them_alike(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(matrix)
    assert torch.allclose(found.double(), _by_singular_values(matrix), atol=1e-4)
    values = torch.linalg.svdvals(found)
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3
    assert torch.isfinite(orthogonal(torch.zeros(shape))).all()


def test_steps_of_kernels_go_along_their_orthogonalised_momentum() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, 2, 2, generator=generator)
    slopes = torch.randn(4, *start.shape, generator=generator)
    weight = nn.Parameter(start.clone())
    steps = Steps.begin({"w": weight}, 1e9)
    expected, momentum = start.double(), torch.zeros(start.shape, dtype=torch.float64)
    for slope in slopes:
        weight.grad = slope.clone()
        assert steps.step(0.01)
        momentum = MOMENTUM * momentum + slope
        way = _by_singular_values((slope + MOMENTUM * momentum).flatten(1)).view_as(start)
        size = float(start.square().mean().sqrt()) / float(way.square().mean().sqrt())
        expected = expected - 0.01 * ALIKE * size * way
    assert torch.allclose(weight.double(), expected, atol=1e-5)


def test_only_matrices_that_cost_little_are_orthogonalised() -> None:
    weights = {
        "bias": nn.Parameter(torch.ones(8)),
        "depthwise": nn.Parameter(torch.ones(8, 1, 3, 3)),
        "scale": nn.Parameter(torch.ones(1, 8)),
        "large": nn.Parameter(torch.ones(300, 200)),
        "kernel": nn.Parameter(torch.ones(8, 4, 3, 3)),
        "linear": nn.Parameter(torch.ones(10, 8)),
    }
    # Each turn multiplies a matrix by its transpose, that by itself, and it by the result.
    kernel, linear = (2 * 5 * (2 * 8 * 8 * long + 8**3) for long in (36, 10))
    assert Steps.begin(weights).matrices == frozenset()
    assert Steps.begin(weights, linear - 1).matrices == frozenset()
    assert Steps.begin(weights, kernel).matrices == {"linear"}
    assert Steps.begin(weights, kernel + linear).matrices == {"linear", "kernel"}
    assert Steps.begin(weights, 1e12).matrices == {"linear", "kernel", "large"}


def test_a_gradient_of_zero_does_not_end_the_learning() -> None:
    weight = nn.Parameter(torch.ones(3))
    steps = Steps.begin({"w": weight})
    for value in (0.0, 1.0, 1.0):
        weight.grad = torch.full((3,), value)
        assert steps.step(0.1)
    assert float(weight.detach().max()) < 0.95


def test_a_long_gradient_is_cut_and_one_that_is_not_finite_refused() -> None:
    weight = nn.Parameter(torch.ones(3))
    steps = Steps.begin({"w": weight})
    for _ in range(20):
        weight.grad = torch.ones(3)
        steps.step(0.0)
    first = steps.first["w"].clone()
    weight.grad = torch.full((3,), 1e6)
    steps.step(0.0)
    assert float(steps.first["w"].max()) <= float(first.max()) * FIRST + (1 - FIRST) * 2.1
    weight.grad = torch.tensor([1.0, math.nan, 1.0])
    assert not steps.step(0.1)
    assert torch.equal(weight, torch.ones(3))
