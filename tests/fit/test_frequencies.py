"""Frequencies over positions, against sums written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from compress.fit.frequencies import Power, cosines, lowest_of_rows, measured, transformed
from compress.fit.regression import Rows
from compress.linalg.geometry import output_rows, patch_rows
from compress.network.baseline import prepare


def test_cosines_are_orthonormal_and_begin_with_the_mean() -> None:
    for length in (1, 2, 5, 8, 20):
        rows = cosines(length)
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64))
        torch.testing.assert_close(rows[0], torch.full((length,), length**-0.5).double())
    # By the definition of the DCT-II.
    third = [math.cos(math.pi / 20 * (p + 0.5) * 3) * math.sqrt(2 / 20) for p in range(20)]
    torch.testing.assert_close(cosines(20)[3], torch.tensor(third, dtype=torch.float64))


@pytest.mark.parametrize("size", [(6,), (5, 12), (3, 4, 9)])
def test_rows_are_transformed_as_maps_are(size: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 4, *size, generator=generator).double()
    rows = maps.flatten(2).transpose(1, 2).reshape(1, -1, 4)
    found = lowest_of_rows(rows, size)
    torch.testing.assert_close(found[0].transpose(1, 2), transformed(maps))
    # One by one, over all positions.
    bases = [cosines(length) for length in size]
    whole = bases[0]
    for basis in bases[1:]:
        whole = torch.einsum("ap,bq->abpq", whole, basis).flatten(0, 1).flatten(1)
    torch.testing.assert_close(transformed(maps), maps.flatten(2) @ whole.T)


def test_power_is_one_on_average_and_finds_what_is_smooth() -> None:
    generator = torch.Generator().manual_seed(1)
    white, constant = Power(), Power()
    for _ in range(4):
        noise = torch.randn(50, 16, 12, 12, generator=generator)
        white.add(noise)
        constant.add(noise[:, :, :1, :1].expand(noise.shape) + 0.1 * noise)
    flat, smooth = white.frequencies(), constant.frequencies()
    assert flat is not None
    assert smooth is not None
    assert float(flat.excess.max()) < 0.1
    assert flat.rest == pytest.approx(1, abs=0.02)
    total = float(smooth.excess.sum()) + smooth.rest * smooth.positions
    assert total == pytest.approx(144, rel=0.01)
    assert float(smooth.excess[0]) == pytest.approx(144 / 1.01, rel=0.05)
    assert smooth.rest < 0.02


def test_one_position_and_nothing_have_no_frequencies() -> None:
    power = Power()
    assert power.frequencies() is None
    power.add(torch.ones(3, 4, 1, 1))
    assert power.frequencies() is None
    nothing = Power()
    nothing.add(torch.zeros(3, 4, 5, 5))
    assert nothing.frequencies() is None


def test_gradients_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(80, 2)
    ).eval()
    images = torch.randn(6, 3, 8, 8)

    def loss(result: Tensor, targets: object) -> Tensor:
        del targets
        return result.square().sum()

    found = measured(model, ["0", "2", "4"], [(images, None)], loss)
    assert set(found) == {"0", "2"}  # a linear layer's single row has no positions
    hidden = model[0](images).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model[1:](hidden), None), hidden)
    power = Power()
    power.add(gradient)
    expected = power.frequencies()
    assert expected is not None
    torch.testing.assert_close(found["0"].excess, expected.excess, rtol=1e-4, atol=1e-5)
    assert found["0"].size == (6, 6)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("size", [(5, 7), (12, 12)])
def test_a_regression_costs_what_its_errors_do(size: tuple[int, ...]) -> None:
    """With all positions seen, against each image's error transformed by itself."""
    generator = torch.Generator().manual_seed(2)
    layer = nn.Conv2d(3, 4, 1)
    site = prepare(nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(1, 3, *size)).sites[0]
    inputs, targets = (torch.randn(9, c, *size, generator=generator).double() for c in (3, 4))
    power = Power()
    power.add(torch.nn.functional.avg_pool2d(targets, 3, 1, 1) + 0.2)
    frequencies = power.frequencies()
    assert frequencies is not None
    rows = Rows.of(site, torch.device("cpu"), frequencies)
    rows.add(patch_rows(inputs, site.geometry), output_rows(targets, site.geometry), held_out=False)
    rows.add_images(inputs, targets, site, held_out=False)
    weighting = torch.randn(4, 4, generator=generator).double()
    weighting = weighting @ weighting.T
    matrix = torch.randn(1, 4, 3, generator=generator).double()

    def cost(bias: Tensor) -> float:
        error = targets - torch.einsum("oi,nihw->nohw", matrix[0], inputs) - bias.view(1, 4, 1, 1)
        root = torch.linalg.cholesky(weighting)
        each = torch.einsum("nohw,oc->nchw", error, root)
        smooth = transformed(each).square().sum((0, 1)) @ frequencies.excess
        whole = frequencies.rest * each.square().sum() + smooth
        return float(whole) / (len(targets) * math.prod(size))

    best = rows.train.bias(matrix)
    for bias in (best, best + 0.3, torch.zeros_like(best)):
        found = rows.train.error(weighting.unsqueeze(0), matrix, bias)
        assert found == pytest.approx(cost(bias), rel=1e-6)
    assert cost(best) < min(cost(best + 0.05), cost(best - 0.05))


def test_without_layers_or_gradients_there_are_no_frequencies() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    images = torch.randn(2, 3, 5, 5)
    assert measured(model, [], [(images, None)], lambda result, _: result.sum()) == {}


def test_where_nothing_is_missed_no_rounding_is_an_error() -> None:
    """A refit would else be kept for having made less than nothing of it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 4, 3, padding=1)
    site = prepare(nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(1, 3, 8, 8)).sites[0]
    layer.double()
    weighting = torch.eye(4).double().unsqueeze(0)
    for seed in range(20):
        inputs = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
        with torch.no_grad():
            targets = layer(inputs)
        rows = Rows.of(site, torch.device("cpu"))
        patches = patch_rows(inputs, site.geometry)
        rows.add(patches, output_rows(targets, site.geometry), held_out=False)
        matrix = layer.weight.detach().double().flatten(1).unsqueeze(0)
        error = rows.train.error(weighting, matrix, rows.train.bias(matrix))
        assert 0 <= error < 1e-12
