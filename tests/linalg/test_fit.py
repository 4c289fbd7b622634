"""Fits against dense oracles: materialised rows, least squares, and a general optimiser."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.linalg import fit as fit_module
from compress.linalg import problem as problem_module
from compress.linalg.alternation import Alternation, conjugate_gradients
from compress.linalg.balance import balance, balance_three
from compress.linalg.fit import (
    Covariances,
    Fit,
    Problem,
    chain_matrix,
    fit,
    grid_losses,
    rank_grid,
    refine,
)
from compress.linalg.geometry import Geometry
from compress.linalg.problem import cholesky_psd, orthogonal_rows, solve_psd
from compress.linalg.schemes import SCHEME_NAMES, scheme_named

ALTERNATED = ("input", "two_sided", "spatial")
GEOMETRY = Geometry("conv2d", 4, 5, (3, 2), padding=(1, 0))
GROUPED = Geometry("conv2d", 6, 8, (2, 3), groups=2)
WIDE = Geometry("conv2d", 3, 9, (1, 2))


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Data:
    """A problem together with the centred rows that it was made of."""

    def __init__(self, geometry: Geometry, *, count: int = 120, live: float = 1.0) -> None:
        groups, out, d = geometry.groups, geometry.out_features, geometry.in_features
        scales = torch.linspace(1.0, 0.1, d, dtype=torch.float64)
        rows = random(groups, count, d) @ (random(groups, d, d) * scales) * live
        self.rows = rows - rows.mean(1, keepdim=True)
        channels = geometry.in_channels // groups
        self.weight = random(groups, out, channels, *geometry.kernel_size, seed=1)
        self.matrix = self.weight.flatten(2)
        gradients = random(groups, 3 * out, out) * torch.arange(1.0, out + 1)
        covariance = self.rows.mT @ self.rows / count
        outputs = self.matrix @ covariance @ self.matrix.mT
        self.problem = Problem(
            geometry, self.weight, Covariances(outputs, covariance), gradients.mT @ gradients
        )
        # Rows of the error are weighted by any root of G.
        self.root = torch.linalg.cholesky(self.problem.weighting)

    @property
    def total(self) -> float:
        return self.loss(torch.zeros_like(self.matrix))

    def loss(self, approximation: Tensor) -> float:
        """Weighted mean squared error of the rows themselves."""
        error = self.rows @ (self.matrix - approximation).mT @ self.root
        return float((error**2).sum()) / self.rows.shape[1]

    def lifted(self, scheme: str, first: Tensor) -> Tensor:
        """What the last factor reads, ``[groups, rows, outer * r]``, tap by tap."""
        geometry = self.problem.geometry
        basis = torch.eye(geometry.in_features, dtype=torch.float64)
        basis = basis.reshape(1, -1, *self.weight.shape[2:]).expand(geometry.groups, -1, -1, -1, -1)
        order = scheme_named(scheme).split_weight(
            basis
        )  # [groups, d, outer, inner]: where feature d goes
        return torch.cat(
            [self.rows @ order[:, :, tap] @ first.mT for tap in range(order.shape[2])], dim=2
        )

    def best_last(self, scheme: str, first: Tensor, second: int | None = None) -> float:
        """Least loss over all last factors, by least squares on the rows."""
        read, total = self.lifted(scheme, first), 0.0
        for group in range(len(read)):
            wanted = self.rows[group] @ self.matrix[group].T @ self.root[group]
            solution = torch.linalg.lstsq(read[group], wanted, driver="gelsd").solution
            explained = read[group] @ solution
            kept = explained
            if second is not None:
                u, s, vh = torch.linalg.svd(explained, full_matrices=False)
                kept = (u[:, :second] * s[:second]) @ vh[:second]
            total += float(((wanted - kept) ** 2).sum()) / len(wanted)
        return total


@pytest.fixture(params=[GEOMETRY, GROUPED, WIDE], ids=["plain", "grouped", "wide"])
def data(request: pytest.FixtureRequest) -> Data:
    return Data(request.param)


def test_spectrum_and_output_fits_are_the_optimum(data: Data) -> None:
    """Eckart and Young: the tail of the weighted rows' singular values, and no rank-r fit less."""
    weighted = data.rows @ data.matrix.mT @ data.root
    values = torch.linalg.svdvals(weighted) ** 2 / data.rows.shape[1]
    limit = data.problem.geometry.full_rank
    torch.testing.assert_close(data.problem.spectrum.eigenvalues, values[:, :limit])
    plain = torch.linalg.svdvals(data.rows @ data.matrix.mT) ** 2 / data.rows.shape[1]
    torch.testing.assert_close(data.problem.plain_spectrum, plain[:, :limit])
    for rank in range(1, limit):
        found = fit(data.problem, "output", (rank,))
        assert found.loss == pytest.approx(float(values[:, rank:].sum()), rel=1e-9)
        assert data.loss(found.matrix) == pytest.approx(found.loss, rel=1e-8)
        assert int(torch.linalg.matrix_rank(found.matrix).max()) == rank
        assert found.projection is not None
        torch.testing.assert_close(found.projection @ data.matrix, found.matrix)


def test_the_plain_error_for_no_weighting_is_the_familiar_tail() -> None:
    data = Data(GEOMETRY)
    problem = Problem(GEOMETRY, data.weight, Covariances(data.problem.output_covariance))
    for rank in range(1, 5):
        found = fit(problem, "output", (rank,))
        assert found.mse == pytest.approx(float(problem.plain_spectrum[0, rank:].sum()) / 5)
        assert found.loss == pytest.approx(found.mse * 5)


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_full_rank_is_exact(data: Data, scheme: str) -> None:
    if data.problem.geometry is WIDE and scheme == "spatial":
        scheme = "input"
    found = fit(data.problem, scheme, (99,) * (2 if scheme == "two_sided" else 1))
    assert found.ranks == scheme_named(scheme).full_ranks(data.problem.geometry)
    product = chain_matrix(data.problem.geometry, scheme, found.weights)
    torch.testing.assert_close(product, data.matrix, rtol=1e-13, atol=1e-13)


def test_a_problem_and_its_reorderings_go_with_their_last_use() -> None:
    """Reference counting alone frees them: they are as large as the covariance."""
    gc.disable()
    try:
        problem = Data(GEOMETRY).problem
        fit(problem, "two_sided", (2, 2))
        grid_losses(problem, "spatial", [1, 2])
        alive = weakref.ref(problem), weakref.ref(problem.split("input"))
        del problem
        assert [a() for a in alive] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
@pytest.mark.parametrize("iterations", [0, 2])
def test_a_grid_without_ranks_has_no_losses(scheme: str, iterations: int) -> None:
    assert grid_losses(Data(GEOMETRY).problem, scheme, [], iterations) == {}


@pytest.mark.parametrize("scheme", ALTERNATED)
def test_grid_losses_equal_least_squares_on_the_rows(data: Data, scheme: str) -> None:
    """The last factor solved at each rank of the nested start, second ranks cut by SVD."""
    geometry = data.problem.geometry
    start = data.problem.split(scheme).start
    limit = scheme_named(scheme).full_ranks(geometry)[0]
    losses = grid_losses(data.problem, scheme, list(range(1, limit + 1)))
    assert len(losses) >= limit
    for ranks, loss in losses.items():
        second = ranks[1] if len(ranks) == 2 else None
        wanted = data.best_last(scheme, start[:, : ranks[0]], second)
        assert loss == pytest.approx(wanted, rel=1e-6, abs=1e-9 * data.total), ranks
        # Where a fit begins, without any alternation.
        begun = Alternation(data.problem.split(scheme), start[:, : ranks[0]], second)
        assert begun.error() == pytest.approx(wanted, rel=1e-6, abs=1e-9 * data.total), ranks


@pytest.mark.parametrize("scheme", ALTERNATED)
def test_alternated_grids_fall_with_rank_and_beat_plain_ones(scheme: str) -> None:
    data = Data(GEOMETRY)
    ranks = list(range(1, scheme_named(scheme).full_ranks(GEOMETRY)[0] + 1))
    plain = grid_losses(data.problem, scheme, ranks)
    better = grid_losses(data.problem, scheme, ranks, iterations=4)
    assert better.keys() == plain.keys()
    slack = 1e-9 * data.total
    first = [ranks for ranks in better if len(ranks) == 1 or ranks[1] == 5]
    for a, b in itertools.pairwise(first):
        assert better[b] <= better[a] + slack
    assert better[first[1]] < 0.999 * plain[first[1]]
    assert all(better[r] <= plain[r] * (1 + 1e-9) + slack for r in first[:1])


@pytest.mark.parametrize("scheme", ALTERNATED)
def test_every_step_of_the_alternation_lowers_the_error(data: Data, scheme: str) -> None:
    split = data.problem.split(scheme)
    run = Alternation(split, split.start[:, :2], 2 if scheme == "two_sided" else None)
    errors = [run.error()]
    for _ in range(6):
        run.solve_first(3)
        run.solve_last()
        errors.append(run.error())
    assert all(b <= a * (1 + 1e-10) for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.999 * errors[0]


@pytest.mark.parametrize("scheme", ["input", "two_sided"])
def test_pointwise_fits_begin_with_the_mean_in_the_basis_where_that_is_best(
    data: Data, scheme: str
) -> None:
    """The basis of r - 1 principal components and what the mean has beside them."""
    problem, geometry = data.problem, data.problem.geometry
    groups, channels = geometry.groups, geometry.in_channels // geometry.groups
    mean = random(groups, geometry.in_features, seed=8)
    problem.input_mean = mean
    split = problem.split(scheme)
    for rank in range(2, channels):
        found = split.components_and_mean(rank)
        assert found is not None
        towards = mean.reshape(groups, channels, -1).mean(2)
        for group in range(groups):
            basis = torch.cat([split.components[group, : rank - 1], towards[None, group]])
            q = torch.linalg.qr(basis.T).Q
            torch.testing.assert_close(found[group].T @ found[group], q @ q.T)
        ranks = (rank, geometry.out_features) if scheme == "two_sided" else (rank,)
        begun = fit(problem, scheme, ranks, iterations=0)
        assert begun.loss <= data.best_last(scheme, found) * (1 + 1e-6)
    assert split.components_and_mean(1) is None
    assert split.components_and_mean(channels) is None
    # A mean that the components hold already adds nothing.
    inside = split.components[:, 0].unsqueeze(2).expand(-1, -1, len(mean[0]) // channels)
    problem.input_mean = inside.flatten(1)
    assert split.components_and_mean(2) is None


@pytest.mark.parametrize("scheme", ALTERNATED)
@pytest.mark.parametrize("geometry", [GEOMETRY, GROUPED], ids=["plain", "grouped"])
def test_fits_reach_what_a_general_optimiser_reaches(geometry: Geometry, scheme: str) -> None:
    """L-BFGS on all factors at once, begun where the fit begins."""
    data = Data(geometry)
    ranks = (2, 2) if scheme == "two_sided" else (2,)
    begun = fit(data.problem, scheme, ranks, iterations=0)
    found = fit(data.problem, scheme, ranks, iterations=300)
    assert data.loss(found.matrix) == pytest.approx(found.loss, rel=1e-9)
    factors = [w.clone().requires_grad_() for w in begun.weights]
    optimiser = torch.optim.LBFGS(factors, max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        product = chain_matrix(geometry, scheme, tuple(factors))
        error = data.rows @ (data.matrix - product).mT @ data.root
        loss = (error**2).sum() / data.rows.shape[1]
        loss.backward()
        return loss

    optimiser.step(closure)
    best = data.loss(chain_matrix(geometry, scheme, tuple(f.detach() for f in factors)))
    assert begun.loss > 1.005 * best
    assert found.loss <= 1.02 * best


@pytest.mark.parametrize(
    ("scheme", "wide"), [*((s, False) for s in SCHEME_NAMES), ("output", True)]
)
def test_refining_keeps_the_first_factor_or_improves_it(
    scheme: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under another target: the last factor alone is least squares, more rounds do better."""
    if wide:
        monkeypatch.setattr(fit_module, "WIDE", 0)
    data, target = Data(GEOMETRY), Data(GEOMETRY)
    ranks = (2, 3) if scheme == "two_sided" else (3,)
    warm = fit(data.problem, scheme, ranks)
    weight = data.weight + 0.3 * random(*data.weight.shape, seed=5)
    target.weight, target.matrix = weight, weight.flatten(2)
    covariance = data.problem.input_covariance
    assert covariance is not None
    target.problem = Problem(
        GEOMETRY, weight, Covariances(target.matrix @ covariance @ target.matrix.mT, covariance)
    )
    target.root = torch.eye(5, dtype=torch.float64)[None]
    once, more = refine(target.problem, warm, 0), refine(target.problem, warm, 30)
    assert once.ranks == more.ranks == ranks
    assert target.loss(once.matrix) == pytest.approx(once.loss, rel=1e-9)
    if scheme == "output":
        best = fit(target.problem, "output", ranks).loss
        assert more.loss == pytest.approx(best)
        if not wide:
            assert once.loss == pytest.approx(best)
            return
    second = ranks[1] if scheme == "two_sided" else None
    first = warm.weights[0].flatten(2)
    assert once.loss == pytest.approx(target.best_last(scheme, first, second), rel=1e-9)
    assert once.loss <= target.loss(warm.matrix)
    assert more.loss < 0.999 * once.loss


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_refining_an_exact_fit_follows_the_new_target(scheme: str) -> None:
    data = Data(GEOMETRY)
    exact = fit(data.problem, scheme, scheme_named(scheme).full_ranks(GEOMETRY))
    other = Problem(GEOMETRY, 2 * data.weight, Covariances(data.problem.output_covariance))
    torch.testing.assert_close(refine(other, exact, 2).matrix, 2 * data.matrix)


@pytest.mark.parametrize("scheme", ALTERNATED)
def test_long_patches_are_fitted_in_float32_as_well_as_in_float64(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(GEOMETRY)
    ranks = (2, 2) if scheme == "two_sided" else (2,)
    grid = grid_losses(data.problem, scheme, [1, 2, 3, 4])
    precise = fit(data.problem, scheme, ranks, iterations=40)
    monkeypatch.setattr(problem_module, "FLOAT32_BEYOND", 0)
    data.problem.release()
    assert data.problem.split(scheme).dtype == torch.float32
    rough = fit(data.problem, scheme, ranks, iterations=40)
    assert all(weight.dtype == torch.float64 for weight in rough.weights)
    assert rough.loss == pytest.approx(data.loss(rough.matrix), rel=1e-9)
    assert rough.loss == pytest.approx(precise.loss, rel=5e-3)
    for found, loss in grid_losses(data.problem, scheme, [1, 2, 3, 4]).items():
        assert loss == pytest.approx(grid[found], rel=1e-3, abs=1e-5 * data.total)


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
@pytest.mark.parametrize("geometry", [GEOMETRY, WIDE], ids=["plain", "wide"])
def test_constant_inputs_fit_without_error(geometry: Geometry, scheme: str) -> None:
    """Zero covariance: nothing varies, so that every rank is free and nothing is NaN."""
    data = Data(geometry, live=0.0)
    ranks = (1, 1) if scheme == "two_sided" else (1,)
    found = fit(data.problem, scheme, ranks)
    assert found.loss == found.mse == 0.0
    assert all(torch.isfinite(weight).all() for weight in found.weights)
    assert set(grid_losses(data.problem, scheme, [1, 2]).values()) == {0.0}
    assert data.problem.variance() == 0.0


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_dead_channels_and_a_dead_group_cost_nothing(scheme: str) -> None:
    """The other group is fitted as if it were alone."""
    data = Data(GROUPED)
    data.rows[1] = 0.0
    data.rows[0, :, :6] = 0.0  # the first input channel
    covariance = data.rows.mT @ data.rows / data.rows.shape[1]
    outputs = data.matrix @ covariance @ data.matrix.mT
    data.problem = Problem(GROUPED, data.weight, Covariances(outputs, covariance))
    data.root = torch.eye(4, dtype=torch.float64).expand(2, -1, -1)
    one = Covariances(outputs[:1], covariance[:1])
    lone = Problem(Geometry("conv2d", 3, 4, (2, 3)), data.weight[:1], one)
    ranks = (2, 2) if scheme == "two_sided" else (2,)
    found, alone = fit(data.problem, scheme, ranks), fit(lone, scheme, ranks)
    assert all(torch.isfinite(weight).all() for weight in found.weights)
    assert found.loss == pytest.approx(data.loss(found.matrix), rel=1e-9)
    assert found.loss == pytest.approx(alone.loss, rel=1e-6)


def test_errors_are_those_of_the_rows(data: Data) -> None:
    other = data.matrix + random(*data.matrix.shape, seed=9)
    loss, mse = data.problem.errors(other)
    assert loss == pytest.approx(data.loss(other))
    error = data.rows @ (data.matrix - other).mT
    assert mse == pytest.approx(float((error**2).mean()))
    outputs = data.rows @ data.matrix.mT
    assert data.problem.variance() == pytest.approx(float((outputs**2).mean()))


def test_what_needs_patches_says_so() -> None:
    data = Data(GEOMETRY)
    problem = Problem(GEOMETRY, data.weight, Covariances(data.problem.output_covariance))
    with pytest.raises(ValueError, match="patches' covariance"):
        problem.errors(data.matrix)
    with pytest.raises(ValueError, match="spatial scheme needs the patches"):
        fit(problem, "spatial", (2,))


@pytest.mark.parametrize(
    ("scheme", "ranks"), [("output", (0,)), ("spatial", (2, 2)), ("two_sided", (2,)), ("svd", (1,))]
)
def test_ranks_that_no_fit_can_have(scheme: str, ranks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=scheme):
        fit(Data(GEOMETRY).problem, scheme, ranks)


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_all_bonds_are_balanced_and_zero_components_survive(scheme: str) -> None:
    data = Data(GROUPED)
    data.weight[1] = 0.0
    problem = Problem(
        GROUPED,
        data.weight,
        Covariances(data.problem.output_covariance, data.problem.input_covariance),
    )
    for ranks in ((1, 2), (2, 1), (3, 4)):
        found = fit(problem, scheme, ranks if scheme == "two_sided" else ranks[:1])
        for left, right in itertools.pairwise(found.weights):
            assert torch.isfinite(left).all()
            torch.testing.assert_close(
                left[0].flatten(1).norm(dim=1),
                right[0].transpose(0, 1).flatten(1).norm(dim=1),
                rtol=1e-7,
                atol=1e-12,
            )
    assert float(found.matrix[1].abs().max()) < 1e-12


def test_balancing_changes_no_product() -> None:
    first, core, up = random(2, 3, 5) * 1e6, random(2, 4, 3, 2), random(2, 6, 4) * 1e-6
    a, b = balance(first, core)
    torch.testing.assert_close(
        torch.einsum("gcro,gri->gcoi", b, a), torch.einsum("gcro,gri->gcoi", core, first)
    )
    a, b, c = balance_three(first, core, up)
    torch.testing.assert_close(
        torch.einsum("gpc,gcro,gri->gpoi", c, b, a),
        torch.einsum("gpc,gcro,gri->gpoi", up, core, first),
    )
    torch.testing.assert_close(a.norm(dim=2), b.norm(dim=(1, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(b.norm(dim=(2, 3)), c.norm(dim=1), rtol=1e-7, atol=0)


def test_conjugate_gradients_solve_each_group_on_its_own() -> None:
    """One group is at its solution, one has nothing to solve, one needs every step."""
    factor = random(3, 4, 6)
    matrix = factor @ factor.mT + 0.1 * torch.eye(4)
    matrix[1] = 0.0
    right = random(3, 4, 2)
    right[:2] = 0.0
    found = conjugate_gradients(lambda a: matrix @ a, lambda a: a, right, 4)
    assert not found[:2].any()
    torch.testing.assert_close(found[2], torch.linalg.solve(matrix[2], right[2]))


def test_solving_with_singular_matrices() -> None:
    factor = random(2, 5, 3) * torch.tensor([1.0, 1e-3, 1e3, 1.0, 0.0])[:, None]
    matrix, wanted = factor @ factor.mT, random(2, 4, 5)
    found = solve_psd(matrix, wanted @ matrix)
    torch.testing.assert_close(found @ matrix, wanted @ matrix, rtol=1e-5, atol=1e-5)
    scale, lower = cholesky_psd(torch.zeros(1, 3, 3, dtype=torch.float64))
    assert torch.isfinite(lower / scale).all()
    with pytest.raises(ValueError, match="not finite"):
        solve_psd(torch.full((1, 2, 2), float("nan")), torch.ones(1, 1, 2))


def test_orthogonal_rows_are_nested() -> None:
    rows = random(2, 4, 6)
    q, triangle = orthogonal_rows(rows)
    torch.testing.assert_close(triangle @ q, rows)
    torch.testing.assert_close(q @ q.mT, torch.eye(4, dtype=torch.float64).expand(2, -1, -1))
    assert float(triangle.triu(1).abs().max()) < 1e-12


@given(limit=st.integers(1, 3000), points=st.integers(1, 60))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_rank_grids(limit: int, points: int) -> None:
    grid = rank_grid(limit, points)
    assert grid == sorted(set(grid))
    assert grid[0] >= 1
    assert grid[-1] == limit
    assert len(grid) <= max(points, 2)
    assert len(grid) == limit or points < limit


def test_a_warm_start_is_never_lost() -> None:
    """Even from factors that no start of its own would find."""
    data = Data(GEOMETRY)
    best = fit(data.problem, "spatial", (3,), iterations=300)
    cold = fit(data.problem, "spatial", (3,), iterations=0)
    assert cold.loss > best.loss
    warm = fit(data.problem, "spatial", (3,), iterations=0, warm=best)
    assert isinstance(warm, Fit)
    assert warm.loss <= best.loss * (1 + 1e-9)
    assert fit(data.problem, "spatial", (4,), iterations=0, warm=best).loss < best.loss
