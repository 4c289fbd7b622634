"""What every layer kind, geometry and scheme must satisfy, against slow oracles."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from functools import cache

import oracles
import pytest
import torch
from cases import CASES, KEPT, Case
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compress.calibrate.collect import calibrate
from compress.calibrate.problems import absorbed_bias, layer_problem
from compress.calibrate.recipe import Recipe
from compress.calibrate.statistics import Calibration, LayerStatistics, Source
from compress.layers import kind_of, registered
from compress.linalg.fit import Fit, Problem, fit, grid_losses, rank_grid
from compress.linalg.geometry import Geometry
from compress.linalg.schemes import (
    SCHEME_NAMES,
    chain_macs,
    chain_params,
    scheme_named,
)
from compress.network.chains import Chain, rewrite
from compress.network.sites import LayerSite, find_sites

EXACT = {"rtol": 1e-9, "atol": 1e-9}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def cubic_loss(output: Tensor, labels: Tensor) -> Tensor:
    """A summed loss for outputs that are not logits, with gradients that differ by channel."""
    del labels
    channels = output.movedim(1, -1) if output.dim() > 2 else output
    scale = torch.arange(1.0, channels.shape[-1] + 1, dtype=output.dtype)
    return (channels**3 * scale).sum() / 3


def batches(x: Tensor, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    parts = torch.split(x, list(sizes))
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in parts]


@dataclass
class Prepared:
    """A layer, its inputs and everything that calibration made of them."""

    case: Case
    layer: nn.Module
    x: Tensor
    site: LayerSite
    statistics: LayerStatistics
    problem: Problem

    def rewritten(self, found: Fit) -> nn.Module:
        bias = absorbed_bias(self.layer, self.statistics, found)
        chain = Chain(found.scheme, found.ranks, found.weights, bias)
        return rewrite(self.layer, {"": self.site}, {"": chain})

    @property
    def total(self) -> float:
        """The loss of removing the layer altogether, what rounding is relative to."""
        return float((self.problem.weighting * self.problem.output_covariance).sum())


def run(case: Case, x: Tensor, sizes: tuple[int, ...], **changes: object) -> Calibration:
    layer = case.layer()
    sites = find_sites(layer, x[:1])
    settings: dict[str, object] = {"schemes": SCHEME_NAMES, "loss": cubic_loss, **changes}
    return calibrate(layer, sites, batches(x, sizes), Source(len(x)), Recipe(**settings))  # type: ignore[arg-type]


@cache
def prepared(case: Case) -> Prepared:
    layer, x = case.layer(), case.inputs()
    (site,) = find_sites(layer, x[:1])
    statistics = run(case, x, (len(x),)).statistics[""]
    return Prepared(case, layer, x, site, statistics, layer_problem(site, layer, statistics))


@cache
def fits(case: Case, scheme: str) -> list[Fit]:
    """Fits over a grid of ranks, up to full, ascending."""
    problem = prepared(case).problem
    limits = scheme_named(scheme).full_ranks(problem.geometry)
    grids = [rank_grid(limit, 99 if scheme == "output" else 4) for limit in limits]
    if scheme == "two_sided":
        ranks = [
            pair for pair in itertools.product(*grids) if pair[0] * 2 > pair[1] or pair == limits
        ]
    else:
        ranks = [(r,) for r in grids[0]]
    return [fit(problem, scheme, r, iterations=3) for r in ranks]


def geometry_of(case: Case) -> Geometry:
    layer = case.layer()
    kind = kind_of(layer)
    assert kind is not None
    return kind.geometry(layer)


each_case = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
PAIRS = [
    pytest.param(case, scheme, id=f"{case.id}-{scheme}")
    for case in CASES
    for scheme in SCHEME_NAMES
    if scheme_named(scheme).unavailable(geometry_of(case)) is None
]
each_pair = pytest.mark.parametrize(("case", "scheme"), PAIRS)


def test_every_registered_kind_and_every_scheme_is_in_the_table() -> None:
    assert {type(case.layer()) for case in CASES} == {kind.module_type for kind in registered()}
    assert {param.values[1] for param in PAIRS} == set(SCHEME_NAMES)


@each_case
def test_statistics_equal_those_of_all_rows_materialised(case: Case) -> None:
    """Also without schemes that need patches, where the cheaper side is taken."""
    p = prepared(case)
    rows = oracles.patch_rows(p.layer, p.x)
    with torch.no_grad():
        outputs = oracles.output_rows(p.layer, p.layer(p.x))
    reference = oracles.covariance(outputs)
    torch.testing.assert_close(p.problem.output_covariance, reference, **EXACT)
    torch.testing.assert_close(p.problem.matrix, oracles.matrix(p.layer), rtol=0, atol=0)
    if p.statistics.inputs is not None:
        torch.testing.assert_close(p.problem.input_covariance, oracles.covariance(rows), **EXACT)
        torch.testing.assert_close(p.statistics.inputs.mean, rows.mean(1), **EXACT)
    cheap = run(case, p.x, (len(p.x),), schemes=("output",), weigh=False).statistics[""]
    assert (cheap.inputs is None) == (p.problem.geometry.in_features >= outputs.shape[2])
    assert cheap.weighting is None
    problem = layer_problem(p.site, p.layer, cheap)
    torch.testing.assert_close(problem.output_covariance, reference, **EXACT)
    assert cheap.samples == rows.shape[1]


@each_case
def test_weighting_equals_explicit_autograd(case: Case) -> None:
    p = prepared(case)
    expected = oracles.weighting(
        p.layer, "", p.x, lambda output, _: cubic_loss(output, torch.zeros(1))
    )
    assert p.statistics.weighting is not None
    torch.testing.assert_close(p.statistics.weighting.second_moment, expected, **EXACT)
    torch.testing.assert_close(p.problem.weighting, oracles.regularised(expected), **EXACT)


@pytest.mark.parametrize("case", [c for c in CASES if c.shape[0] > 2], ids=lambda case: case.id)
def test_any_batch_split_gives_the_same_moments(case: Case) -> None:
    p = prepared(case)
    half, rest = len(p.x) // 2, len(p.x) - len(p.x) // 2
    for sizes in ((half, rest), (1, len(p.x) - 2, 1)):
        other = run(case, p.x, sizes).statistics[""].moments()
        for role, moments in p.statistics.moments().items():
            assert other[role].count == moments.count
            for found, wanted in (
                (other[role].mean, moments.mean),
                (other[role].scatter, moments.scatter),
            ):
                near = 1e-7 * float(wanted.abs().max())
                torch.testing.assert_close(found, wanted, rtol=1e-7, atol=near)


@each_pair
def test_full_rank_is_the_identity(case: Case, scheme: str) -> None:
    p, full = prepared(case), fits(case, scheme)[-1]
    assert full.ranks == scheme_named(scheme).full_ranks(p.problem.geometry)
    assert full.loss == full.mse == 0.0
    with torch.no_grad():
        torch.testing.assert_close(p.rewritten(full)(p.x), p.layer(p.x), **EXACT)


@each_pair
def test_predicted_errors_equal_measured_ones(case: Case, scheme: str) -> None:
    p = prepared(case)
    for found in fits(case, scheme):
        loss, mse = oracles.measured_errors(p.layer, p.rewritten(found), p.x, p.problem.weighting)
        tolerance = 1e-9 * p.total
        assert found.loss == pytest.approx(loss, rel=1e-7, abs=tolerance), found.ranks
        assert found.mse == pytest.approx(mse, rel=1e-7, abs=1e-9 * p.problem.variance())


@each_pair
def test_the_mean_output_stays(case: Case, scheme: str) -> None:
    p = prepared(case)
    new = p.rewritten(fits(case, scheme)[0])
    with torch.no_grad():
        before, after = (oracles.channels_last(p.layer, m(p.x)).mean(0) for m in (p.layer, new))
    torch.testing.assert_close(after, before, **EXACT)


@each_pair
def test_predicted_loss_never_rises_with_rank(case: Case, scheme: str) -> None:
    p = prepared(case)
    limits = scheme_named(scheme).full_ranks(p.problem.geometry)
    losses = grid_losses(p.problem, scheme, rank_grid(limits[0], 99))
    slack = 1e-10 * p.total
    assert losses[limits] == pytest.approx(0, abs=slack)
    for ranks, loss in losses.items():
        assert loss >= -slack
        for axis in range(len(ranks)):
            bigger = tuple(r + (i == axis) for i, r in enumerate(ranks))
            assert losses.get(bigger, 0.0) <= loss + slack, (ranks, bigger)
    # A fit begins where the grid stands, so that a plan's prediction is never optimistic.
    for found in fits(case, scheme):
        assert found.loss <= losses[found.ranks] * (1 + 1e-7) + slack


@each_pair
def test_fits_warmed_by_smaller_ones_never_rise(case: Case, scheme: str) -> None:
    p = prepared(case)
    ranks = scheme_named(scheme).full_ranks(p.problem.geometry)
    warm = None
    for step in (0.25, 0.5, 0.75, 1.0):
        size = tuple(max(1, round(r * step)) for r in ranks)
        found = fit(p.problem, scheme, size, iterations=3, warm=warm)
        assert warm is None or found.loss <= warm.loss + 1e-10 * p.total
        warm = found


@each_pair
def test_cost_agrees_with_torchs_counter(case: Case, scheme: str) -> None:
    p = prepared(case)
    found = fits(case, scheme)[len(fits(case, scheme)) // 2]
    image, chain = p.x[:1], scheme_named(scheme).stages(p.site.geometry, found.ranks)
    for module, macs, params in (
        (p.layer, p.site.macs, p.site.params),
        (
            p.rewritten(found),
            p.site.count_macs(lambda call: chain_macs(chain, call.size)),
            chain_params(chain),
        ),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(image)
        assert macs * 2 == counter.get_total_flops()
        assert params == sum(parameter.numel() for parameter in module.parameters())


@each_pair
def test_factors_are_balanced_at_every_bond(case: Case, scheme: str) -> None:
    for found in fits(case, scheme):
        for left, right in itertools.pairwise(found.weights):
            a, b = left.flatten(2).norm(dim=2), right.transpose(1, 2).flatten(2).norm(dim=2)
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


@each_pair
def test_chains_are_plain_layers_with_one_bias_at_the_end(case: Case, scheme: str) -> None:
    p = prepared(case)
    chain = p.rewritten(fits(case, scheme)[0])
    assert type(chain) is nn.Sequential
    plain = {kind.module_type for kind in registered()}
    assert {type(layer) for layer in chain} <= plain
    assert [layer.bias is not None for layer in chain] == [False] * (len(chain) - 1) + [True]
    groups = getattr(p.layer, "groups", 1)
    assert all(getattr(layer, "groups", 1) == groups for layer in chain)


@each_case
def test_the_source_is_untouched(case: Case) -> None:
    layer, x = case.layer().train(), case.inputs()
    before, random = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    (site,) = find_sites(layer, x[:1])
    found = calibrate(layer, [site], batches(x, (len(x),)), Source(len(x)), Recipe(loss=cubic_loss))
    problem = layer_problem(site, layer, found.statistics[""])
    first = fit(problem, "output", (1,))
    bias = absorbed_bias(layer, found.statistics[""], first)
    new = rewrite(layer, {"": site}, {"": Chain("output", (1,), first.weights, bias)})
    assert layer.training
    assert new.training
    assert torch.equal(torch.get_rng_state(), random)
    assert not layer._forward_hooks
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.requires_grad and p.grad is None for p in layer.parameters())
    kept = {t.data_ptr() for t in layer.parameters()}
    assert not kept & {t.data_ptr() for t in new.parameters()}


@each_case
def test_output_recovers_data_of_true_rank(case: Case) -> None:
    """A weight of rank r in every group compresses to r without loss."""
    layer, x = case.layer(), case.inputs()
    groups, outputs, features = oracles.sizes(layer)
    rank = max(1, min(outputs, features) // 2)
    generator = torch.Generator().manual_seed(3)
    low = torch.randn(groups, outputs, rank, generator=generator, dtype=torch.float64)
    low = low @ torch.randn(groups, rank, features, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for index in itertools.product(range(groups), range(outputs), range(features)):
            layer.weight[oracles.weight_index(layer, *index)] = low[index]
    (site,) = find_sites(layer, x[:1])
    for weigh in (True, False):
        statistics = calibrate(
            layer,
            [site],
            batches(x, (len(x),)),
            Source(len(x)),
            Recipe(loss=cubic_loss, weigh=weigh),
        ).statistics[""]
        found = fit(layer_problem(site, layer, statistics), "output", (rank,))
        bias = absorbed_bias(layer, statistics, found)
        new = rewrite(layer, {"": site}, {"": Chain("output", (rank,), found.weights, bias)})
        with torch.no_grad():
            torch.testing.assert_close(new(x), layer(x), **EXACT)


@pytest.mark.parametrize(("case", "word"), KEPT, ids=[case.id for case, _ in KEPT])
def test_what_has_no_rank_to_cut_is_kept_with_the_reason(case: Case, word: str) -> None:
    (site,) = find_sites(case.layer(), case.inputs()[:1])
    assert site.skip is not None
    assert word in site.skip
    assert site.schemes == ()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        case.layer()(case.inputs()[:1])
    assert site.macs * 2 == counter.get_total_flops()
