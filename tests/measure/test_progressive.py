"""What a network gives after each further layer is replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import narrowable
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compress
from compress.measure import progressive
from compress.network.baseline import Network, prepare
from compress.network.mirror import replacements_of
from compress.network.sites import LayerSite
from compress.pipeline.outcome import Compressed
from compress.running.forward import evaluation_mode
from compress.running.modules import replace_module


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Awkward(nn.Module):
    """A layer that is called twice, views that are written to, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.side = nn.Conv2d(6, 2, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        flat = x.flatten(2)
        y = self.act(self.twice(x))
        x.add_(y)  # also what `flat` is a view of
        side = self.side(x)
        z = self.twice(self.act(x))
        z = F.relu_(z).mean((2, 3)) + flat.mean(2)
        return {"side": side.mean((2, 3)), "out": self.head(z)}


class Deciding(nn.Module):
    """A forward that has no graph: it decides by what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.second = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.flatten(1)))
        if float(x.detach().abs().max()) > 1e-3:
            x = torch.tanh(self.second(x))
        return self.head(x)


def noisy(network: Network) -> dict[str, nn.Module]:
    """Another version of every layer."""
    twin = copy.deepcopy(network.model)
    for parameter in twin.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    names = [site.name for site in network.sites]
    return replacements_of(network, twin, names)


def by_hand(network: Network, replacements: dict[str, nn.Module], first: int) -> nn.Module:
    """A copy of the network with its first layers replaced."""
    twin = copy.deepcopy(network.model)
    order: list[LayerSite] = [network.site(name) for name in replacements]
    for site in order[:first]:
        for alias in site.aliases:
            replace_module(twin, alias, copy.deepcopy(replacements[site.name]))
    return twin


@pytest.mark.parametrize("name", [*narrowable.NETWORKS, "awkward"])
def test_one_walk_gives_what_networks_with_their_first_layers_replaced_do(name: str) -> None:
    if name == "awkward":
        images = torch.randn(3, 3, 5, 5)
        network = prepare(Awkward().eval(), images[:1])
    else:
        network, images = narrowable.prepared(name)
    replacements = noisy(network)
    walk = progressive._shared_walk(network, replacements)
    assert walk is not None
    assert walk.names == tuple(replacements)
    kept = images.clone()
    with torch.no_grad(), evaluation_mode(network.model):
        found = list(walk.results(images))
        assert len(found) == len(replacements) + 1
        for first, result in enumerate(found):
            expected = by_hand(network, replacements, first)(images.clone())
            torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(images, kept)


def test_the_walk_runs_nothing_twice_that_prefixes_share() -> None:
    network = prepare(nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)]).eval(), torch.randn(1, 4))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    replacements = noisy(network)
    for module in (*network.model, *replacements.values()):  # type: ignore[operator]  # a Sequential
        module.register_forward_hook(count)
    walk = progressive._shared_walk(network, replacements)
    assert walk is not None
    with torch.no_grad():
        assert len(list(walk.results(torch.randn(2, 4)))) == 7
    # Each replacement once, and each real layer once for itself and each layer before it.
    assert calls == 6 + sum(range(1, 7))


def curve_of(made: Compressed) -> list[float]:
    assert made.result.progressive is not None
    values = [point.value for point in made.result.progressive.points]
    return [value for value in values if value is not None]


def made(model: nn.Module, images: Any, test: Any, **settings: object) -> Compressed:
    common = {"no_latency": True, "progressive": True, "calibration_images": len(images)}
    return compress.compress_model(model, images, test=test, **{**common, **settings})


def expected_curve(run: Compressed, measure: Callable[[nn.Module], float]) -> list[float]:
    mirror = run.mirror()
    values = []
    with torch.no_grad():
        for first in range(len(mirror.names) + 1):
            mirror.replace_first(first)
            values.append(measure(mirror.eval()))
    return values


@pytest.mark.parametrize("name", ["mobile", "tokens", "deciding"])
@pytest.mark.parametrize("labelled", [True, False])
def test_classifiers_are_measured_by_accuracy_or_by_agreement(name: str, labelled: bool) -> None:
    build, shape = narrowable.NETWORKS.get(name, (Deciding, (3, 2, 2)))
    model = build().eval()
    images = narrowable.smooth(96, shape)
    with torch.no_grad():
        labels = model(images).argmax(1)
        labels[::5] = (labels[::5] + 1) % 3
    test = (images[60:], labels[60:]) if labelled else None
    run = made(model, images[:60], test, params=0.6, batch_size=7)
    curve = run.result.progressive
    assert curve is not None
    assert [point.layer for point in curve.points] == ["", *run.mirror().names]
    assert (run.network.graph is None) == (name == "deciding")

    if labelled:
        assert run.result.test is not None
        assert (curve.metric, curve.unit, curve.set) == ("accuracy", "fraction", "test")
        assert curve.images == 36

        def right(network: nn.Module) -> float:
            return float((network(images[60:]).argmax(1) == labels[60:]).double().mean())

        assert curve_of(run) == pytest.approx(expected_curve(run, right))
        assert curve.points[0].value == pytest.approx(run.result.test.top1_before)
        assert curve.points[-1].value == pytest.approx(run.result.test.top1_after)
    else:
        assert run.result.validation is not None
        assert (curve.metric, curve.set) == ("agreement with the original", "validation")
        assert curve.points[0].value == 1.0
        assert curve.points[-1].value == pytest.approx(run.result.validation.agreement)


def test_values_are_measured_by_how_far_they_are_apart() -> None:
    build, shape = narrowable.NETWORKS["upscaled"]
    images = narrowable.smooth(40, shape)
    run = made(build().eval(), images, None, params=0.6, metric="mse")
    curve = run.result.progressive
    assert curve is not None
    assert (curve.metric, curve.lower_is_better) == ("relative error of the outputs", True)
    assert run.result.validation is not None
    assert curve.points[0].value == 0.0
    last = run.result.validation.outputs[0].relative_mse
    assert curve.points[-1].value == pytest.approx(last, rel=1e-3)


def test_a_task_measures_in_its_own_unit() -> None:
    pytest.importorskip("lightning_utilities", reason="needs torchmetrics (compress[metrics])")
    build, shape = narrowable.NETWORKS["upscaled"]
    model = build().eval()
    images = narrowable.smooth(40, shape)
    with torch.no_grad():
        targets = model(images).clamp(0, 1)
    data = torch.utils.data.TensorDataset(images, targets)
    fit, test = (torch.utils.data.Subset(data, part) for part in (range(24), range(24, 40)))
    run = made(model, fit, test, params=0.6, task="regression")
    curve = run.result.progressive
    assert curve is not None
    assert run.result.test is not None
    custom = run.result.test.custom
    assert custom is not None
    assert (curve.metric, curve.unit, curve.lower_is_better) == (
        custom.name, custom.unit, custom.lower_is_better,
    )  # fmt: skip
    assert curve.points[0].value == pytest.approx(custom.before, abs=1e-6)
    assert curve.points[-1].value == pytest.approx(custom.after, rel=1e-4)


def test_it_changes_nothing_about_the_model_and_is_left_out_by_default() -> None:
    build, shape = narrowable.NETWORKS["chain"]
    model = build().eval()
    images = narrowable.smooth(40, shape)
    with_curve = made(model, images, None, params=0.7)
    without = made(model, images, None, params=0.7, progressive=False)
    assert without.result.progressive is None
    assert with_curve.manifest == without.manifest
    for one, other in zip(with_curve.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(one, other)
