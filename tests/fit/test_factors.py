"""Factors on the way from old ones to new ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compress.fit.factors import Factors, partly, whole
from compress.linalg.fit import with_weights
from compress.linalg.geometry import Geometry
from compress.linalg.schemes import SCHEME_NAMES, scheme_named
from compress.network.chains import Chain

GEOMETRY = Geometry("conv", 8, 12, (3, 3))


def some(scheme: str, ranks: tuple[int, ...], seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    stages = scheme_named(scheme).stages(GEOMETRY, ranks)
    weights = tuple(
        torch.randn(1, s.out_channels, s.in_channels, *s.kernel_size, generator=generator).double()
        for s in stages
    )
    fit = with_weights(GEOMETRY, replace(whole(weights[0]), scheme=scheme, ranks=ranks), weights)
    bias = torch.randn(12, generator=generator).double()
    return Factors(fit, bias, torch.eye(12).double().unsqueeze(0))


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_the_way_begins_and_ends_where_it_should(scheme: str) -> None:
    ranks = (4,) * len(scheme_named(scheme).full_ranks(GEOMETRY))
    old, new = some(scheme, ranks, 0), some(scheme, ranks, 1)
    assert partly(old, new, 1.0, GEOMETRY) is new
    for share, end in ((0.0, old), (1 - 1e-12, new)):
        found = partly(old, new, share, GEOMETRY)
        torch.testing.assert_close(found.fit.matrix, end.fit.matrix, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.bias, end.bias)
        assert isinstance(found.chain, Chain)
        assert [w.shape for w in found.fit.weights] == [w.shape for w in old.fit.weights]


@pytest.mark.parametrize("scheme", ["output", "input", "spatial"])
def test_factors_that_are_only_turned_stay_what_they_are(scheme: str) -> None:
    """Rotated between, a chain is the same; half of the way must be so too."""
    old = some(scheme, (4,), 0)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    first, last = old.fit.weights
    turned = (
        torch.einsum("ab,gb...->ga...", turn, first),
        torch.einsum("gob...,ab->goa...", last, turn),
    )
    new = replace(old, fit=replace(old.fit, weights=turned), bias=old.bias + 2)
    found = partly(old, new, 0.5, GEOMETRY)
    torch.testing.assert_close(found.fit.matrix, old.fit.matrix)
    torch.testing.assert_close(found.bias, old.bias + 1)


def test_a_layer_by_itself_goes_straight() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 12, 8, 3, 3, generator=generator).double() for _ in range(2))
    bias, weighting = torch.zeros(12).double(), torch.eye(12).double().unsqueeze(0)
    old, new = (Factors(whole(w), bias, weighting) for w in (a, b))
    found = partly(old, new, 0.25, GEOMETRY)
    torch.testing.assert_close(found.fit.weights[0], 0.75 * a + 0.25 * b)
    assert found.fit.scheme == "narrow"
