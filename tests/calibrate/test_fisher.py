"""The loss whose gradients have the Fisher information as their second moment."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compress.calibrate.fisher import RandomSigns, fisher_loss


def gradients(logits: Tensor, signs: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(fisher_loss(logits, signs), logits)
    return found


@pytest.mark.parametrize("scale", [0.5, 3.0, 30.0])
def test_over_all_signs_the_second_moment_is_the_hessian_of_the_likelihood(scale: float) -> None:
    """For any label the Hessian of the negative log-likelihood is Fisher's, ``diag(p) - p pᵀ``."""
    generator = torch.Generator().manual_seed(0)
    z = scale * torch.randn(4, generator=generator, dtype=torch.float64)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    g = gradients(z.expand(len(signs), -1), signs)
    wanted = torch.autograd.functional.hessian(lambda v: torch.logsumexp(v, 0) - v[2], z)
    torch.testing.assert_close(g.mT @ g / len(g), wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(g.mean(0), torch.zeros_like(z), rtol=0, atol=1e-12)


def test_every_image_contributes_its_whole_trace_under_any_signs_for_two_classes() -> None:
    """Where labels would be sampled, nearly all images would give next to nothing."""
    z = torch.tensor([[0.0, 7.0]], dtype=torch.float64)
    p = torch.softmax(z, 1)[0]
    for signs in itertools.product((-1.0, 1.0), repeat=2):
        g = gradients(z, torch.tensor([signs], dtype=torch.float64))
        trace = (p[0] * p[1]).item() * 2
        # (√p₀ s₀ p₁ - √p₁ s₁ p₀)², twice: between (√p₀ p₁ - √p₁ p₀)² and (√p₀ p₁ + √p₁ p₀)².
        spread = 2 * (p[0] * p[1]).item() ** 1.5
        assert abs(g.square().sum().item() - trace) <= 2 * spread + 1e-12


def test_signs_do_not_depend_on_the_batches_and_differ_by_image_and_seed() -> None:
    logits = torch.zeros(50, 7)
    whole = RandomSigns(50, 3).take(0, logits)
    parts = RandomSigns(50, 3)
    assert torch.equal(whole, torch.cat([parts.take(0, logits[:20]), parts.take(20, logits[20:])]))
    assert set(whole.flatten().tolist()) == {-1.0, 1.0}
    assert abs(float(whole.mean())) < 0.2
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, RandomSigns(50, 4).take(0, logits))


def test_the_global_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    RandomSigns(5, 0).take(0, torch.zeros(5, 3))
    assert torch.equal(torch.get_rng_state(), state)
