"""Refitting without a graph: layers that are watched, in networks that decide by their images."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from refitting import factors_of, labelled, rewritten, traced_of
from stopwatch import stop_the_clock
from torch import Tensor, nn

import compress
from compress.errors import ModelError
from compress.fit import by_module, regression
from compress.fit.by_module import ModuleWalk, Watched, refit_by_module
from compress.fit.factors import Factors
from compress.fit.frontier import Frontier
from compress.fit.in_order import _InOrder, refit
from compress.fit.walk import RefitImages, RefitSettings
from compress.network.baseline import Network, prepare
from compress.report import build_report, render_html, render_markdown

RANKS = {"second": ("output", 3), "third": ("spatial", 5), "fourth": ("input", 3)}


class Chain(nn.Module):
    """Layers one after the other, with an in-place ReLU behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.fourth = nn.Conv2d(8, 12, 3, stride=2)
        self.head = nn.Linear(12, 5)
        self.relu = nn.ReLU(inplace=True)

    def early(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(x))))

    def late(self, x: Tensor) -> Tensor:
        x = self.relu(self.fourth(self.relu(self.third(x))))
        return self.head(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.early(x))


class Branching(Chain):
    """Two equal ways on, chosen by what the image holds."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(x)
        if float(x.detach().mean()) > 0.1:
            return self.late(x)
        return self.late(1 * x)


class Elsewhere(Chain):
    """A layer that only dark batches reach, and one that they run twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(x)
        if float(x.detach().mean()) < 0.1:
            x = self.relu(self.third(x))
        x = self.relu(self.fourth(x))
        return self.head(x.mean((2, 3)))


class Swallows(Chain):
    """A forward that goes on whatever happens, as far as a program should."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.early(x)
            return self.late(x if float(x.detach().mean()) > 0.1 else 1 * x)
        except Exception:
            return self.head(x.new_zeros(len(x), 12))


def network_of(kind: type[Chain]) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return prepare(kind().eval(), torch.randn(1, 3, 9, 9))


def made_images() -> Tensor:
    """Batches of nine are bright and dark by turns."""
    generator = torch.Generator().manual_seed(1)
    smooth = torch.randn(72, 3, 3, 3, generator=generator)
    images = F.interpolate(smooth, size=9, mode="bilinear")
    return images * torch.tensor([3.0, 0.5] * 4).repeat_interleave(9).view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return made_images()


def given(images: Tensor) -> RefitImages:
    return RefitImages(labelled(images[:36], 9), labelled(images[36:54], 9))


def watched(network: Network) -> Watched:
    return Watched(network.model, {site.name: site for site in network.sites})


def moments(found: dict[str, regression.Rows]) -> list[Tensor]:
    parts = [half.moments for rows in found.values() for half in (rows.train, rows.held_out)]
    return [tensor for part in parts for tensor in (part.mean, part.covariance)]


def test_a_chain_gives_the_rows_that_its_graph_gives(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regression, "ROWS", 54 * 20)  # fewer than the positions: they are drawn
    network = network_of(Chain)
    factors, traced, names = factors_of(network, images[:36], RANKS), traced_of(network), [*RANKS]
    along = _InOrder(traced, Frontier(1 << 30, tmp_path))
    for name, found in factors.items():
        along.install(traced.sites[name], found)
    by_name = {node.name: node for node in along.lockstep.nodes}
    walk = ModuleWalk(watched(network), factors, Frontier(1 << 30, tmp_path), 5)
    with torch.no_grad():
        along.start(given(images))
        expected = {n: along.advance(by_name[n], traced.sites[n], 5) for n in names}
        walk.start(given(images))
        assert walk.comparable() == names
        found_rows = {name: walk.rows(names, [name])[name] for name in names}
        at_once = walk.rows(names, names)
    assert expected["second"].train.moments.count == 36 * 20
    for one, two, three in zip(
        moments(expected), moments(found_rows), moments(at_once), strict=True
    ):
        torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(three, one, rtol=1e-6, atol=1e-9)


def test_a_chain_is_refitted_as_along_its_graph(images: Tensor) -> None:
    network = network_of(Chain)
    factors = factors_of(network, images[:36], RANKS)
    before = copy.deepcopy(network.model.state_dict())
    # Which takes no gradients, and so does not know how smooth errors may be.
    settings = RefitSettings(weigh=False)
    expected, changes = refit(traced_of(network), factors, given(images), settings)
    found, outcome = refit_by_module(watched(network), factors, given(images), settings)
    assert any(found[name] is not factors[name] for name in RANKS)
    for name in RANKS:
        assert outcome[name].before == pytest.approx(changes[name].before, rel=1e-4)
        assert outcome[name].after == pytest.approx(changes[name].after, rel=1e-3)
        torch.testing.assert_close(
            found[name].fit.matrix, expected[name].fit.matrix, rtol=1e-3, atol=1e-4
        )
    for key, value in network.model.state_dict().items():
        assert torch.equal(value, before[key]), f"the dense network's {key} was changed"


@torch.no_grad()
def error(network: Network, factors: dict[str, Factors], images: Tensor) -> float:
    model = rewritten(network, factors)
    return float((model(images) - network.model(images)).square().mean())


@pytest.mark.parametrize("kind", [Branching, Swallows])
def test_a_network_that_branches_by_its_images_gains(kind: type[Chain], images: Tensor) -> None:
    network = network_of(kind)
    assert network.graph is None
    factors = factors_of(network, images[:36], RANKS)
    found, outcome = refit_by_module(watched(network), factors, given(images))
    assert set(outcome) == set(RANKS)
    for name, change in outcome.items():
        assert (change.after < change.before) == (found[name] is not factors[name])
    unseen = images[54:]
    assert error(network, found, unseen) < 0.9 * error(network, factors, unseen)


def test_a_batch_that_does_not_reach_a_layer_is_no_matter_to_it(images: Tensor) -> None:
    network = network_of(Elsewhere)
    # The example decides which layers there are: it is a dark one.
    assert network.site("third").skip is None
    factors = factors_of(network, images[9:18], RANKS)
    _, outcome = refit_by_module(watched(network), factors, given(images))
    assert set(outcome) == set(RANKS)
    only_bright = RefitImages(labelled(images[:9]), labelled(images[36:45]))
    _, outcome = refit_by_module(watched(network), factors, only_bright)
    assert set(outcome) == {"second", "fourth"}


def test_a_layer_that_the_networks_do_not_call_alike_is_passed_over(images: Tensor) -> None:
    """What a layer gives decides how often another runs, as in networks that refine a result."""

    class Twice(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("exact", self.second.weight.detach().clone())
            self.register_buffer("offset", self.second.bias.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.first(x))
            exact = F.conv2d(x, self.exact, self.offset, padding=1)
            x = self.second(x)
            again = float((x - exact).detach().abs().max()) > 1e-3
            for _ in range(2 if again else 1):
                x = self.relu(self.third(self.relu(x)))
            return self.late(x)

        def late(self, x: Tensor) -> Tensor:
            return self.head(self.relu(self.fourth(x)).mean((2, 3)))

    network = network_of(Twice)
    factors = factors_of(network, images[:36], RANKS)
    found, outcome = refit_by_module(watched(network), factors, given(images))
    assert set(outcome) == {"second", "fourth"}
    assert found["third"] is factors["third"]


def test_the_runs_are_bounded_and_end_at_the_layer(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    forwards: list[int] = []

    def counting(module: nn.Module, kind: str) -> None:
        module.register_forward_pre_hook(lambda *_: calls.append(kind))

    real = by_module.run_model

    def run(model: nn.Module, inputs: Tensor) -> Tensor:
        forwards.append(id(model))
        return real(model, inputs)

    monkeypatch.setattr(by_module, "run_model", run)
    network = network_of(Branching)
    factors = factors_of(network, images[:36], RANKS)
    counting(network.model.head, "head")
    refit_by_module(watched(network), factors, given(images))
    dense = id(network.model)
    assert forwards.count(dense) == 2 * 6, "six batches: once to compare calls, once for targets"
    assert len(forwards) - forwards.count(dense) == (1 + 3) * 6
    assert len(calls) == 2 * 6, "only the comparison goes to the end, in either network"
    forwards.clear()
    monkeypatch.setattr(by_module, "MOST_RUNS", 2)
    _, outcome = refit_by_module(watched(network), factors, given(images))
    assert set(outcome) == set(RANKS)
    assert len(forwards) - forwards.count(dense) == (1 + 2) * 6
    forwards.clear()
    monkeypatch.setattr(by_module, "MOST_RUNS", 64)
    # With memory for one layer's outputs only, the dense network runs once for each.
    refit_by_module(watched(network), factors, given(images), RefitSettings(cache_bytes=2))
    assert forwards.count(dense) == (1 + 3) * 6


def test_an_error_of_the_forward_itself_is_told(images: Tensor) -> None:
    network = network_of(Branching)
    factors = factors_of(network, images[:36], RANKS)
    wrong = RefitImages(labelled(images[:9]), labelled(images[:9, :2]))
    with pytest.raises(ModelError, match="forward failed"):
        refit_by_module(watched(network), factors, wrong)


@pytest.mark.parametrize(
    ("kind", "settings", "path", "words"),
    [
        (Chain, {}, "graph", "Refitted along the graph, layer by layer and then jointly"),
        (Branching, {}, "modules", "Refitted layer by layer only, since the network has no graph"),
        (Branching, {"refit": False}, "none", "Not refitted: it was switched off."),
        (Chain, {"keep": ("*",), "macs": 1.0}, "none", "Not refitted: no layer was rewritten."),
    ],
)
def test_the_report_says_which_way_was_taken(
    monkeypatch: pytest.MonkeyPatch,
    images: Tensor,
    kind: type[Chain],
    settings: dict[str, Any],
    path: str,
    words: str,
) -> None:
    stop_the_clock(monkeypatch)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind().eval()
    made = compress.compress_model(model, images, **{"macs": 0.6, "batch_size": 9, **settings})
    assert made.result.refit_path == path
    assert any(x.refitted for x in made.result.layers) == (path != "none")
    report = build_report(made.result)
    assert words in render_markdown(report)
    assert words in render_html(report)
    branches = kind is not Chain
    assert any("not jointly" in warning for warning in made.result.warnings) == branches
