"""Calibration of whole networks: weighting, sharing, subsets of positions, edges, bad input."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn

import compress.calibrate.collect as calibrate_module
from compress.calibrate.collect import calibrate, wants_patches
from compress.calibrate.fisher import RandomSigns
from compress.calibrate.problems import absorbed_bias, layer_problem
from compress.calibrate.recipe import Recipe
from compress.calibrate.statistics import Calibration, LayerStatistics, Source
from compress.errors import CalibrationError, GradientError, ModelError
from compress.linalg.fit import fit
from compress.linalg.moments import Moments
from compress.network.chains import Chain, rewrite
from compress.network.sites import LayerSite, find_sites

EXACT = {"rtol": 1e-9, "atol": 1e-9}
NEAR = {"rtol": 1e-7, "atol": 1e-9}


class Network(nn.Module):
    """A shared convolution, an in-place activation, a shortcut, groups, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.shared = nn.Conv2d(4, 4, (3, 1), padding="same", groups=2)
        self.head = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = x + self.shared(self.act(self.shared(x)))
        x = self.dropout(x.mean((2, 3)))
        return self.head(x)


def network() -> Network:
    torch.manual_seed(0)
    return Network().double().eval()


def images(count: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *(shape or (2, 7, 6)), generator=generator, dtype=torch.float64)


def run(
    model: nn.Module, x: Tensor, sizes: list[int] | None = None, **settings: Any
) -> Calibration:
    sites = settings.pop("sites", None) or find_sites(model, x[:1])
    parts = torch.split(x, sizes or [len(x)])
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in parts]
    source = Source(len(x), memory_format=settings.pop("memory_format", "contiguous"))
    return calibrate(model, sites, batches, source, Recipe(**settings))


def site_of(model: nn.Module, x: Tensor, name: str = "") -> LayerSite:
    return next(site for site in find_sites(model, x[:1]) if site.name == name)


def assert_same(found: LayerStatistics, wanted: LayerStatistics) -> None:
    assert found.moments().keys() == wanted.moments().keys()
    for role, moments in wanted.moments().items():
        other = found.moments()[role]
        assert other.count == moments.count
        for a, b in ((other.mean, moments.mean), (other.scatter, moments.scatter)):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7 * float(b.abs().max()))


@pytest.mark.parametrize("name", ["stem", "shared", "head"])
def test_weighting_equals_autograd_along_the_same_direction(name: str) -> None:
    """One image at a time, gradients by ``torch.autograd.grad``; both calls of a shared layer."""
    model, x = network(), images(9)
    found = run(model, x, [4, 5], seed=3).statistics[name].weighting
    signs = RandomSigns(9, 3).take(0, model(x))

    def loss(logits: Tensor, number: int) -> Tensor:
        """Against the softmax's own Jacobian: ``F = J``, ``L = J diag(1 / √p)``."""
        p = torch.softmax(logits[0].detach(), 0)
        jacobian = torch.autograd.functional.jacobian(
            lambda z: torch.softmax(z, 0), logits[0].detach()
        )
        return logits[0] @ (jacobian @ (signs[number] / p.sqrt()))

    wanted = oracles.weighting(model, name, x, loss)
    assert found is not None
    torch.testing.assert_close(found.second_moment, wanted, **NEAR)


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [11, 1]])
def test_any_batches_give_the_same_statistics(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random signs and subsets of positions included."""
    monkeypatch.setattr(calibrate_module, "FREE_PATCHES", 100)
    monkeypatch.setattr(calibrate_module, "FREE_OUTPUTS", 100)
    model, x = network(), images(12)
    settings: dict[str, Any] = {"schemes": ("output", "spatial"), "samples_per_dimension": 2}
    whole = run(model, x, **settings).statistics
    parts = run(model, x, sizes, **settings).statistics
    assert whole["stem"].samples == 12 * 9  # ceil(100 / 12) of 42 positions
    for name, statistics in whole.items():
        assert_same(parts[name], statistics)


def test_chosen_positions_are_spread_evenly_and_differ_between_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer whose outputs are the numbers of its positions."""
    monkeypatch.setattr(calibrate_module, "FREE_OUTPUTS", 400)
    layer = nn.Conv2d(2, 2, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2)[:, :, None, None])
    place = torch.arange(100, dtype=torch.float64).reshape(1, 1, 10, 10).expand(40, 1, -1, -1)
    image = torch.arange(40, dtype=torch.float64).reshape(40, 1, 1, 1).expand(-1, 1, 10, 10)
    x = torch.cat([place, image], dim=1)
    found = run(layer, x, weigh=False, samples_per_dimension=1).statistics[""]
    assert found.samples == 400
    assert found.outputs is not None
    mean, variance = found.outputs.mean[0], found.outputs.covariance[0].diagonal()
    # Every image gives ten positions, one in each tenth of the 100.
    assert float(mean[1]) == pytest.approx(19.5)
    assert float(variance[1]) == pytest.approx((40**2 - 1) / 12)
    assert float(mean[0]) == pytest.approx(49.5, abs=0.6)
    assert float(variance[0]) == pytest.approx(100**2 / 12, rel=0.02)
    again = run(layer, x, weigh=False, samples_per_dimension=1).statistics[""]
    other = run(layer, x, weigh=False, samples_per_dimension=1, seed=1).statistics[""]
    assert again.outputs is not None
    assert other.outputs is not None
    assert torch.equal(again.outputs.scatter, found.outputs.scatter)
    assert not torch.equal(other.outputs.scatter, found.outputs.scatter)


def test_the_memory_format_changes_nothing_but_rounding() -> None:
    model, x = network(), images(10)
    before = {name: (p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
    contiguous = run(model, x).statistics
    last = run(model, x, memory_format="channels_last").statistics
    for name, statistics in contiguous.items():
        assert_same(last[name], statistics)
    assert {n: (p.data_ptr(), p.stride()) for n, p in model.named_parameters()} == before


def test_a_shared_layer_pools_its_calls_and_is_seen_before_in_place_operations() -> None:
    model, x = network(), images(6)
    found = run(model, x, weigh=False, schemes=("output",)).statistics["shared"]
    seen: list[Tensor] = []
    model.shared.register_forward_hook(lambda *call: seen.append(call[2].detach().clone()))
    with torch.no_grad():
        model(x)
    assert len(seen) == 2
    rows = torch.cat([oracles.output_rows(model.shared, y) for y in seen], dim=1)
    assert found.outputs is not None
    assert found.samples == rows.shape[1] == 2 * 6 * 42
    torch.testing.assert_close(found.outputs.mean, rows.mean(1), **EXACT)
    torch.testing.assert_close(found.outputs.covariance, oracles.covariance(rows), **EXACT)


@pytest.mark.parametrize("weigh", [True, False])
def test_the_model_is_left_as_it_was(weigh: bool) -> None:
    model, x = network().train(), images(6)
    model.norm.eval()
    model.stem.weight.requires_grad_(False)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    flags = [module.training for module in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    given = x.clone()
    run(model, x, weigh=weigh)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(x, given)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("weigh", [True, False])
def test_activations_that_are_not_finite_name_the_layer(bad: float, weigh: bool) -> None:
    model, x = network().train(), images(6)
    sites = find_sites(model, x[:1])
    with torch.no_grad():
        model.shared.bias[1] = bad
    with pytest.raises(CalibrationError, match=r"'shared' .*NaN or infinite.* number 0"):
        run(model, x, sites=sites, weigh=weigh)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_broken_image_is_found_by_its_batch() -> None:
    x = images(6)
    x[5, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"'stem' .* number 4"):
        run(network(), x, [4, 2])


def test_gradients_that_are_not_finite_name_the_layer() -> None:
    layer = nn.Linear(3, 2).double()
    x = images(4, 3)

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return (output - output.detach()).sqrt().sum() + labels.sum()

    with pytest.raises(CalibrationError, match=r"weighting of layer ''.*--metric mse"):
        run(layer, x, loss=loss)
    assert not layer._forward_hooks


@pytest.mark.parametrize("shape", [(), (1,), (3, 2)])
def test_of_outputs_that_are_no_logits_all_count_alike(shape: tuple[int, ...]) -> None:
    """The weighting is then ``E[JᵀJ]``: the identity, of a layer that is the whole network."""
    model = nn.Sequential(nn.Linear(3, math.prod(shape)), nn.Unflatten(1, shape or (1,)))
    if not shape:
        model.append(nn.Flatten(0))
    x = torch.randn(400, 3)
    sites = [dataclasses.replace(site, skip=None) for site in find_sites(model, x[:1])]
    weighting = run(model, x, sites=sites).statistics["0"].weighting
    assert weighting is not None
    size = math.prod(shape)
    found = weighting.second_moment[0]
    ones = torch.ones(size, dtype=torch.float64)
    torch.testing.assert_close(found.diagonal(), ones, rtol=1e-5, atol=0)
    assert float((found - torch.eye(size)).abs().max()) < 0.25


def test_probabilities_are_weighed_as_their_logits_are() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 4).double(), images(6, 3)
    found = [
        run(model, x).statistics[name].weighting
        for model, name in ((layer, ""), (nn.Sequential(layer, nn.Softmax(1)), "0"))
    ]
    assert found[0] is not None
    assert found[1] is not None
    torch.testing.assert_close(found[1].second_moment, found[0].second_moment)


def test_a_loss_of_the_users_own_gets_the_labels() -> None:
    layer, x = nn.Linear(3, 2).double(), images(5, 3)
    labels = torch.tensor([2, 0, 1, 5, 3])
    sites = find_sites(layer, x[:1])
    batches = [(x[:2], labels[:2]), (x[2:], labels[2:])]
    found = calibrate(
        layer, sites, batches, Source(5), Recipe(loss=lambda y, t: (y * t.unsqueeze(1)).sum())
    ).statistics[""]
    assert found.weighting is not None
    wanted = (labels.double() ** 2).mean() * torch.ones(1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(found.weighting.second_moment, wanted)


def test_a_layer_that_reaches_no_loss_is_measured_plainly() -> None:
    """No gradient comes back from it: G is not there, and the plain metric stands in."""

    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.side, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.side(x).detach())

    model, x = Detached().double(), images(40, 3)
    found = run(model, x).statistics["side"]
    problem = layer_problem(site_of(model, x, "side"), model.side, found)
    assert torch.equal(problem.weighting[0], torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_models_are_measured(dtype: torch.dtype) -> None:
    """Statistics of what the half model computed, in float64; large sums do not overflow."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 144, 3)).to(dtype)
    with torch.no_grad():
        model[0].bias += 100
        model[2].weight /= 1000
    x = images(8, 2, 14, 14).to(dtype)
    found = run(model, x).statistics["0"]
    with torch.no_grad():
        rows = oracles.output_rows(model[0], model[0](x)).double()
    outputs = layer_problem(site_of(model, x, "0"), model[0], found).output_covariance
    assert outputs.dtype == torch.float64
    assert found.outputs is not None
    torch.testing.assert_close(found.outputs.mean, rows.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(outputs, oracles.covariance(rows), rtol=1e-4, atol=1e-5)
    assert found.weighting is not None
    assert found.weighting.is_finite()


def test_models_may_change_their_input_in_place() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 4)).double()
    x = images(6, 3)
    given = x.clone()
    run(model, x)
    assert torch.equal(x, given)


def predicted_and_measured(layer: nn.Module, x: Tensor, rank: int) -> tuple[float, float, Tensor]:
    site = site_of(layer, x)
    statistics = run(layer, x, weigh=False).statistics[""]
    found = fit(layer_problem(site, layer, statistics), "output", (rank,))
    bias = absorbed_bias(layer, statistics, found)
    new = rewrite(layer, {"": site}, {"": Chain("output", (rank,), found.weights, bias)})
    with torch.no_grad():
        error = new(x) - layer(x)
    return found.mse, float((error**2).mean()), error


def test_one_image_and_fewer_samples_than_channels() -> None:
    """The covariance is shrunk, so that the prediction does not promise a perfect fit."""
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 16, 3).double()
    x = images(1, 6, 5, 4)  # six positions for sixteen channels
    predicted, measured, error = predicted_and_measured(layer, x, 8)
    assert bool(torch.isfinite(error).all())
    assert measured < 1e-12
    assert predicted > 1e-3
    statistics = run(layer, x, weigh=False).statistics[""]
    assert statistics.samples == 6
    assert statistics.outputs is not None
    raw = statistics.outputs.covariance
    shrunk = layer_problem(site_of(layer, x), layer, statistics).output_covariance
    assert int(torch.linalg.matrix_rank(raw[0])) == 5
    assert int(torch.linalg.matrix_rank(shrunk[0])) == 16
    assert float(shrunk[0].trace()) == pytest.approx(float(raw[0].trace()))


def test_enough_samples_are_not_shrunk() -> None:
    layer, x = nn.Linear(9, 4).double(), images(40, 9)
    statistics = run(layer, x, weigh=False).statistics[""]
    problem = layer_problem(site_of(layer, x), layer, statistics)
    assert statistics.outputs is not None
    assert torch.equal(problem.output_covariance, statistics.outputs.covariance)
    few = run(layer, x[:39], weigh=False).statistics[""]
    assert few.outputs is not None
    problem = layer_problem(site_of(layer, x), layer, few)
    assert not torch.equal(problem.output_covariance, few.outputs.covariance)


def test_constant_outputs_keep_their_constant() -> None:
    """Zero covariance: any rank is exact, the bias does all the work."""
    layer, x = nn.Conv2d(3, 6, 3).double(), torch.full((4, 3, 8, 8), 1.7, dtype=torch.float64)
    predicted, measured, error = predicted_and_measured(layer, x, 1)
    assert predicted == pytest.approx(0, abs=1e-25)
    assert measured == pytest.approx(0, abs=1e-25)
    torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=1e-12)


def test_dead_channels_cost_no_rank() -> None:
    """Three of six outputs are constant: rank three is exact, biases included."""
    layer = nn.Conv2d(4, 6, 3).double()
    with torch.no_grad():
        layer.weight[::2] = 0
    predicted, measured, error = predicted_and_measured(layer, images(4, 4, 9, 9), 3)
    assert predicted == pytest.approx(0, abs=1e-15)
    assert measured == pytest.approx(0, abs=1e-15)
    torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("layer", "schemes", "wanted"),
    [
        (nn.Conv2d(3, 64, 3), ("output",), True),  # 27 < 64
        (nn.Conv2d(8, 64, 3), ("output",), False),  # 72 > 64
        (nn.Conv2d(8, 64, 3), ("output", "spatial"), True),
        (nn.Conv2d(64, 64, (1, 3)), ("spatial",), False),  # nothing is separable
        (nn.Conv2d(64, 64, 1), ("output", "input", "two_sided", "spatial"), False),
        (nn.Linear(8, 9), ("output",), True),
        (nn.Conv2d(911, 64, 3), ("spatial",), False),  # 8199 numbers a patch
    ],
)
def test_the_cheaper_side_unless_a_scheme_needs_patches(
    layer: nn.Module, schemes: tuple[str, ...], wanted: bool
) -> None:
    x = torch.zeros(1, layer.weight.shape[1], *(5,) * (layer.weight.dim() - 2))
    assert wants_patches(site_of(layer, x), Recipe(schemes=schemes)) == wanted


def test_kept_layers_are_passed_over() -> None:
    model, x = network(), images(4)
    sites = find_sites(model, x[:1], keep=lambda m: "kept" if m is model.stem else None)
    assert set(run(model, x, sites=sites).statistics) == {"shared", "head"}


def test_the_bias_needs_means() -> None:
    layer, x = nn.Conv2d(3, 4, 3).double(), images(4, 3, 9, 9)
    site = site_of(layer, x)
    full = run(layer, x, weigh=False, schemes=("spatial",)).statistics[""]
    found = fit(layer_problem(site, layer, full), "spatial", (2,))
    outputs = LayerStatistics(outputs=Moments(1, 4))
    with pytest.raises(ValueError, match="patches' mean"):
        absorbed_bias(layer, outputs, found)


class Detaching(nn.Module):
    """Computes without gradients, or breaks after its last layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(4, 3), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.how == "broken":
            return y / (y[:1] - y[:1])
        return y.detach()


class Frozen(nn.Module):
    """Runs one of two branches, or rounds them, as ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.side, self.main, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(8, 2)
        self.how = how

    def features(self, x: Tensor) -> Tensor:
        if self.how == "rounded":
            return self.side(x).round()
        if self.how == "not trained":
            with torch.no_grad():
                return self.side(x).relu()
        return self.side(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(torch.cat([self.features(x), self.main(x).relu()], 1))
        return y.round() if self.how == "rounded" else y


def test_parts_that_run_without_gradients_are_weighed_like_the_rest() -> None:
    """The weights that they have are those of the same network without ``torch.no_grad``."""
    x = images(40, 3)
    found, wanted = (run(Frozen(how).double(), x) for how in ("not trained", "trained"))
    for name in ("side", "main", "head"):
        assert_same(found.statistics[name], wanted.statistics[name])
    weighting = found.statistics["side"].weighting
    assert weighting is not None
    assert weighting.any()
    assert torch.is_grad_enabled()


class Writes(nn.Module):
    """Keeps an average, bounds a weight and makes a layer, all under ``torch.no_grad``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).relu()
        with torch.no_grad():
            self.average.mul_(0.9).add_(y.mean(0), alpha=0.1)
            self.average[0] += 1
            self.head.weight.clamp_(-2, 2)
            halving = nn.Linear(4, 4, bias=False).to(x)
            halving.weight.copy_(torch.eye(4) / 2)
        return self.head(halving(y - self.average))


def test_what_is_written_without_gradients_stays_without() -> None:
    model, x = Writes().double(), images(40, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = run(model, x, [10, 10, 20]).statistics
    assert all(moments.weighting is not None for moments in found.values())
    assert not model.average.requires_grad
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_gradient_of_zero_everywhere_is_said() -> None:
    with pytest.raises(GradientError, match="are zero at every layer"):
        run(Frozen("rounded").double(), images(6, 3))
    assert run(Frozen("rounded").double(), images(6, 3), weigh=False).statistics["side"].samples


def test_outputs_without_gradients_are_said() -> None:
    model, x = Detaching("detached"), torch.randn(6, 4)
    with pytest.raises(GradientError, match="No gradient comes back"):
        run(model, x)
    assert run(model, x, weigh=False).statistics["layer"].samples == 6


def test_what_breaks_after_the_last_layer_is_not_blamed_on_a_layer() -> None:
    with pytest.raises(ModelError, match="which no module of it gave"):
        run(Detaching("broken"), torch.randn(6, 4))


def test_layers_of_a_branch_without_real_inputs_are_weighed_too() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.text = nn.Embedding(9, 4), nn.Linear(4, 6)
            self.image, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, words: Tensor, image: Tensor) -> Tensor:
            return self.head(self.text(self.words(words).mean(1)).relu() + self.image(image))

    model, inputs = Both().eval(), (torch.arange(8).view(4, 2), torch.randn(4, 5))
    sites = find_sites(model, (inputs[0][:1], inputs[1][:1]))
    found = calibrate(model, sites, [(inputs, torch.zeros(4))], Source(4), Recipe())
    for name in ("text", "image", "head"):
        weighting = found.statistics[name].weighting
        assert weighting is not None
        assert weighting.count == 4, name


def test_images_of_many_sizes_share_one_table_of_positions() -> None:
    positions = calibrate_module._Positions(50, 400, 3)
    for size in range(20, 60):
        taken = positions.take(0, size % 50, 1, size)
        assert taken is not None
        assert taken.shape == (1, 8)
        assert bool((taken.diff() >= 0).all())
        assert 0 <= int(taken.min()) <= int(taken.max()) < size
    assert len(positions.tables) == 1


def test_rows_beyond_the_images_have_signs_of_their_own() -> None:
    signs = RandomSigns(4, 0).take(0, torch.zeros(12, 3))
    assert signs.shape == (12, 3)
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}


def test_statistics_move_to_a_device() -> None:
    model, x = nn.Linear(3, 2), torch.randn(8, 3)
    found = calibrate(
        model, find_sites(model, x[:1]), [(x, torch.zeros(8))], Source(8), Recipe(pool=True)
    ).to(torch.device("meta"))
    kinds = vars(found.statistics[""]).values()
    assert {m.scatter.device.type for m in kinds if m is not None} == {"meta"}
    assert {m.mean.device.type for m in kinds if m is not None} == {"meta"}
