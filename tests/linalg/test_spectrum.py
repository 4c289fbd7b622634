"""Eigenbases, roots, regularisation and shrinkage against numpy and formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.linalg.problem import roots_of
from compress.linalg.spectrum import eigenbasis, regularise, shrink, shrinkage, tail_of


def positive(groups: int, n: int, rank: int | None = None, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(groups, n, rank or 2 * n, generator=generator, dtype=torch.float64)
    return factor @ factor.mT


def test_eigenvalues_descend_and_rebuild_the_matrix() -> None:
    matrix = positive(3, 5)
    found = eigenbasis(matrix)
    for group in range(3):
        wanted = np.linalg.svd(matrix[group].numpy(), compute_uv=False)
        np.testing.assert_allclose(found.eigenvalues[group].numpy(), wanted, rtol=1e-10)
    rebuilt = (found.eigenvectors * found.eigenvalues.unsqueeze(1)) @ found.eigenvectors.mT
    torch.testing.assert_close(rebuilt, matrix)


def test_eigenvalues_are_never_negative_and_tails_add_up() -> None:
    found = eigenbasis(positive(2, 6, rank=2))
    assert float(found.eigenvalues.min()) >= 0
    tail = tail_of(found.eigenvalues)
    assert tail.shape == (7,)
    for rank in range(7):
        assert float(tail[rank]) == pytest.approx(float(found.eigenvalues[:, rank:].sum()))


def test_roots_of_a_metric() -> None:
    """Also of channels whose gradients are of very different sizes."""
    sizes = torch.tensor([1e-3, 1.0, 1e2, 1e3], dtype=torch.float64)
    matrix = positive(2, 4) * sizes * sizes.unsqueeze(1)
    root, inverse = roots_of(matrix)
    torch.testing.assert_close(root.mT @ root, matrix, rtol=1e-10, atol=0)
    torch.testing.assert_close(root @ inverse, torch.eye(4, dtype=torch.float64).expand(2, -1, -1))


def test_regularised_weighting_is_positive_definite() -> None:
    """Logits: the gradients of a softmax sum to zero, so that G is singular."""
    weighting = positive(1, 4, rank=3)
    found = regularise(weighting)
    ridge = 1e-6 * weighting[0].trace() / 4 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(found[0], weighting[0] + ridge, rtol=1e-14, atol=0)
    assert float(torch.linalg.eigvalsh(found).min()) > 0


def test_no_gradient_at_all_gives_the_identity() -> None:
    found = regularise(torch.zeros(2, 3, 3, dtype=torch.float64))
    assert torch.equal(found, torch.eye(3, dtype=torch.float64).expand(2, -1, -1))


def test_a_dead_group_weighs_next_to_nothing() -> None:
    weighting = positive(2, 3)
    weighting[1] = 0
    found = regularise(weighting)
    assert float(found[1].trace()) == pytest.approx(1e-6 * float(weighting[0].trace()) / 2)


def test_shrinkage_is_that_of_its_paper() -> None:
    """Chen, Wiesel, Eldar and Hero (2010), equation 23, for one matrix."""
    rng = np.random.default_rng(0)
    for samples, n in ((5, 8), (20, 8), (500, 3)):
        rows = rng.standard_normal((samples, n)) * np.arange(1, n + 1)
        covariance = np.cov(rows.T, bias=True)
        square, trace = np.trace(covariance @ covariance), np.trace(covariance)
        wanted = ((1 - 2 / n) * square + trace**2) / (
            (samples + 1 - 2 / n) * (square - trace**2 / n)
        )
        found = shrinkage(torch.from_numpy(covariance)[None], samples)
        assert found == pytest.approx(min(1.0, wanted))
        assert 0 < found <= 1


def test_shrinking_helps_where_samples_are_few() -> None:
    truth = torch.diag(torch.linspace(1.0, 3.0, 12, dtype=torch.float64))[None]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(10, 12, generator=generator, dtype=torch.float64) @ truth[0].sqrt()
    sample = torch.cov(rows.T, correction=0)[None]
    found = shrink(sample, shrinkage(sample, 10))
    assert float((found - truth).norm()) < 0.7 * float((sample - truth).norm())
    assert float(found[0].trace()) == pytest.approx(float(sample[0].trace()))


@pytest.mark.parametrize(
    ("matrix", "samples"),
    [
        (torch.zeros(1, 3, 3, dtype=torch.float64), 5),
        (torch.ones(2, 1, 1, dtype=torch.float64), 5),
        (positive(1, 3), 0),
    ],
)
def test_nothing_to_shrink(matrix: Tensor, samples: int) -> None:
    assert shrinkage(matrix, samples) == 0.0


def test_a_scaled_identity_is_shrunk_to_itself() -> None:
    eye = 2 * torch.eye(4, dtype=torch.float64)[None]
    weight = shrinkage(eye, 10)
    assert weight == 1.0
    torch.testing.assert_close(shrink(eye, weight), eye)
