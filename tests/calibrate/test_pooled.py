"""Rows pooled by gradient, against the gradient of the weight that autograd gives."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, Case
from torch import Tensor, nn

from compress.calibrate import pooled
from compress.calibrate.collect import calibrate
from compress.calibrate.problems import fit_problem, layer_problem
from compress.calibrate.recipe import Recipe
from compress.calibrate.statistics import LayerStatistics, Source
from compress.layers import kind_of
from compress.linalg.schemes import SCHEME_NAMES
from compress.network.sites import LayerSite, find_sites

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
NEAR = {"rtol": 1e-9, "atol": 1e-12}
PATCHES = [c for c in CASES if c.id not in ("conv1x1", "conv3d-1x1", "linear", "linear-tokens")]


def loss(output: Tensor, labels: Tensor) -> Tensor:
    del labels
    return (output**3).sum()


def collected(case: Case, sizes: tuple[int, ...]) -> tuple[nn.Module, LayerSite, LayerStatistics]:
    layer, x = case.layer(), case.inputs()
    (site,) = find_sites(layer, x[:1])
    parts = [(part, torch.zeros(len(part))) for part in x.split(list(sizes))]
    found = calibrate(
        layer, (site,), parts, Source(len(x)), Recipe(schemes=SCHEME_NAMES, pool=True, loss=loss)
    )
    return layer, site, found.statistics[""]


@pytest.mark.parametrize("case", PATCHES[:4], ids=lambda c: c.id)
def test_large_images_are_pooled_a_block_of_positions_at_a_time(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = len(case.inputs())
    whole = collected(case, (count,))[2].pooled
    monkeypatch.setattr(pooled, "_CHUNK", 100)
    blocks = collected(case, (count,))[2].pooled
    assert whole is not None
    assert blocks is not None
    assert blocks.count == whole.count
    torch.testing.assert_close(blocks.scatter, whole.scatter, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(blocks.mean, whole.mean, rtol=1e-5, atol=1e-7)


def weight_gradients(layer: nn.Module, x: Tensor) -> Tensor:
    """``D [images, groups, out, d]``, one image at a time."""
    kind = kind_of(layer)
    assert kind is not None
    found = []
    for image in x:
        (gradient,) = torch.autograd.grad(loss(layer(image.unsqueeze(0)), x), [layer.weight])
        moved = copy.deepcopy(layer)
        moved.weight.data.copy_(gradient)
        found.append(kind.weight(moved).flatten(2))
    return torch.stack(found)


@pytest.mark.parametrize("case", PATCHES, ids=lambda c: c.id)
def test_pooled_rows_are_the_rows_of_the_weights_gradient(case: Case) -> None:
    layer, _, statistics = collected(case, (len(case.inputs()),))
    assert statistics.inputs is not None
    assert statistics.pooled is not None
    D = weight_gradients(layer, case.inputs())
    kind = kind_of(layer)
    assert kind is not None
    for number, image in enumerate(case.inputs()):
        output = layer(image.unsqueeze(0))
        g = kind.images(torch.autograd.grad(loss(output, image), [output])[0])
        total = g.flatten(2).sum((0, 2)).reshape(*D.shape[1:3], 1)
        D[number] -= total * statistics.inputs.mean.unsqueeze(1)
    wanted = torch.einsum("igcd,igce->gde", D, D) / (D.shape[0] * D.shape[2])
    torch.testing.assert_close(statistics.pooled.second_moment[:, :-1, :-1], wanted, **NEAR)


@pytest.mark.parametrize("case", PATCHES, ids=lambda c: c.id)
def test_the_metric_has_the_size_of_the_centred_gradients(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trace times the positions is the mean squared norm of ``Σ_p g_p (x_p - m)ᵀ``."""
    layer, site, statistics = collected(case, (len(case.inputs()),))
    assert statistics.inputs is not None
    monkeypatch.setattr(pooled, "PLAIN_SHARE", 0.0)
    problem = fit_problem(site, layer, statistics)
    x, mean = case.inputs(), statistics.inputs.mean
    kind = kind_of(layer)
    assert kind is not None
    squares = 0.0
    for number, D in enumerate(weight_gradients(layer, x)):
        output = layer(x[number : number + 1])
        g = torch.autograd.grad(loss(output, x), [output])[0]
        total = kind.images(g).flatten(2).sum((0, 2)).reshape(mean.shape[0], -1)
        squares += float((D - total.unsqueeze(2) * mean.unsqueeze(1)).square().sum())
    assert problem.input_covariance is not None
    traces = [
        m.diagonal(dim1=-2, dim2=-1).sum(-1) for m in (problem.weighting, problem.input_covariance)
    ]
    size = float((traces[0] * traces[1]).sum())
    assert site.positions * size == pytest.approx(squares / len(x), rel=1e-5)


def test_outputs_are_pooled_where_they_are_the_shorter_rows() -> None:
    case = next(c for c in CASES if c.id == "linear-tokens")
    layer, _, statistics = collected(case, (2, 3))
    assert statistics.outputs is not None
    assert statistics.pooled is not None
    rows = []
    for image in case.inputs():
        y = layer(image.unsqueeze(0)).detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(y, y), [y])
        centred = y[0] - statistics.outputs.mean
        extended = torch.cat([centred, torch.ones(len(y[0]), 1, dtype=y.dtype)], dim=1)
        rows += [sum(g[0, t, c] * extended[t] for t in range(len(extended))) for c in range(5)]
    wanted = sum(torch.outer(row, row) for row in rows) / len(rows)
    torch.testing.assert_close(statistics.pooled.second_moment[0], wanted.detach(), **NEAR)


@pytest.mark.parametrize("chunk", [1, 1000])
def test_batches_and_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CASES if c.id == "conv-groups")
    _, _, whole = collected(case, (6,))
    monkeypatch.setattr(pooled, "_CHUNK", chunk)
    _, _, parts = collected(case, (1, 3, 2))
    assert whole.pooled is not None
    assert parts.pooled is not None
    assert whole.pooled.count == parts.pooled.count
    torch.testing.assert_close(parts.pooled.second_moment, whole.pooled.second_moment, **NEAR)


def test_a_sketch_of_the_channels_is_right_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CASES if c.id == "conv3x3-wide")
    _, site, whole = collected(case, (6,))
    assert whole.pooled is not None
    monkeypatch.setattr(pooled, "POOLED_ROWS", 6 * 4)
    total = torch.zeros_like(whole.pooled.second_moment)
    layer, x = case.layer(), case.inputs()
    for seed in range(100):
        found = (
            calibrate(
                layer,
                (site,),
                [(x, torch.zeros(6))],
                Source(6),
                Recipe(schemes=SCHEME_NAMES, pool=True, loss=loss, seed=seed),
            )
            .statistics[""]
            .pooled
        )
        assert found is not None
        assert found.count == 6 * 4
        total += found.second_moment / 100
    scale = float(whole.pooled.second_moment.diagonal(dim1=-2, dim2=-1).mean())
    torch.testing.assert_close(total, whole.pooled.second_moment, rtol=0.2, atol=0.2 * scale)


def test_without_any_gradient_the_plain_metric_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)).double()
    layer = model[0]
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        model[1].weight.zero_()  # what the first layer gives has no effect
    site, other = find_sites(model, x[:1])
    recipe = Recipe(schemes=SCHEME_NAMES, pool=True, loss=lambda output, _: output.sum())
    found = calibrate(model, (site, other), [(x, torch.zeros(4))], Source(4), recipe).statistics[
        "0"
    ]
    plain, problem = layer_problem(site, layer, found), fit_problem(site, layer, found)
    assert problem.input_covariance is not None
    assert plain.input_covariance is not None
    torch.testing.assert_close(problem.input_covariance, plain.input_covariance)
    assert bool(torch.isfinite(problem.weighting).all())


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_metric_is_never_indefinite(offset: float) -> None:
    """Nearly rank-deficient patches far from zero: one grey channel blown up to sixteen."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 1), nn.Conv2d(16, 16, 3, padding=1)).requires_grad_(False)
    x = torch.rand(40, 1, 12, 12) + offset
    sites = find_sites(net, x[:1])
    parts = [(part, torch.zeros(len(part))) for part in x.split(10)]
    recipe = Recipe(schemes=SCHEME_NAMES, pool=True, loss=loss)
    statistics = calibrate(net, sites, parts, Source(len(x)), recipe).statistics["1"]
    problem = fit_problem(sites[1], net[1], statistics)
    assert problem.input_covariance is not None
    values = torch.linalg.eigvalsh(problem.input_covariance)
    assert float(values.min()) >= 0
    assert float(values.max()) > 1e3 * float(values.median())
