"""The walk of two networks side by side, and refitting along it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from refitting import Residual, factors_of, labelled, rewritten, traced_of
from torch import Tensor, nn

from compress.errors import ArtefactError
from compress.fit import regression
from compress.fit.frontier import Environment, Frontier, Pair
from compress.fit.in_order import _InOrder, refit
from compress.fit.lockstep import Lockstep, residual_partner
from compress.fit.regression import RIDGES, ROWS, most_rows, ridges, too_large
from compress.fit.walk import RefitImages, RefitSettings
from compress.linalg.geometry import Geometry, output_rows, patch_rows
from compress.network.baseline import Network, prepare


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    model = Residual().eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return prepare(model, torch.randn(1, 3, 9, 9))


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    smooth = torch.randn(48, 3, 3, 3, generator=generator)
    return nn.functional.interpolate(smooth, size=9, mode="bilinear")


RANKS = {"first": ("output", 3), "second": ("spatial", 5)}


def test_lockstep_computes_what_both_networks_compute_apart(
    network: Network, images: Tensor
) -> None:
    factors = factors_of(network, images, RANKS)
    compressed = rewritten(network, factors)
    assert network.graph is not None
    lockstep = Lockstep(network.model, network.graph)
    lockstep.chains |= {name: compressed.get_submodule(name) for name in RANKS}
    output = next(n for n in lockstep.nodes if n.op == "output").all_input_nodes[0]
    given = images.clone()
    with torch.no_grad():
        environment = {lockstep.nodes[0].name: Pair(images, images)}
        lockstep.run(environment, lockstep.nodes[1:-1])
        torch.testing.assert_close(environment[output.name].dense, network.model(images))
        torch.testing.assert_close(environment[output.name].compressed, compressed(images))
    assert set(environment) == {output.name}, "values are dropped after their last use"
    assert torch.equal(images, given), "in-place operations must not reach the images"


def test_lockstep_computes_a_shared_prefix_once(network: Network, images: Tensor) -> None:
    assert network.graph is not None
    lockstep = Lockstep(network.model, network.graph)
    lockstep.chains["second"] = copy.deepcopy(network.model.get_submodule("second"))
    nodes = {n.name: n for n in lockstep.nodes}
    environment = {lockstep.nodes[0].name: Pair(images, images)}
    with torch.no_grad():
        until = lockstep.nodes.index(nodes["second"])
        lockstep.run(environment, lockstep.nodes[1:until])
        assert all(pair.same for pair in environment.values())
        lockstep.run(environment, [nodes["second"]])
    assert not environment["second"].same


def test_the_partner_of_a_sum_is_found_where_it_is_known_already(network: Network) -> None:
    assert network.graph is not None
    nodes = list(network.graph.nodes)
    modules = dict(network.model.named_modules())
    by_name = {n.name: n for n in nodes}
    for name in ("first", "second"):
        node = by_name[name]
        before = set(nodes[: nodes.index(node)])
        partner = residual_partner(node, before, modules)
        assert partner is not None, f"{name} is added to a shortcut"
        assert residual_partner(node, set(), modules) is None, "not computed yet"
    assert residual_partner(by_name["stem"], set(nodes), modules) is None


def test_the_target_is_what_the_sum_lacks(network: Network, images: Tensor, tmp_path: Path) -> None:
    factors = factors_of(network, images, RANKS)
    compressed = rewritten(network, factors)
    traced = traced_of(network)
    sites = traced.sites
    walk = _InOrder(traced, Frontier(1 << 30, tmp_path))
    for name, found in factors.items():
        walk.install(sites[name], found)
    seen: dict[str, Tensor] = {}

    def watch(model: nn.Module, key: str) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[f"{key} in"], seen[f"{key} out"] = inputs[0].clone(), output.clone()

        handle = model.get_submodule("second").register_forward_hook(hook)
        with torch.no_grad():
            model(images)
        handle.remove()

    watch(network.model, "dense")
    watch(compressed, "compressed")
    with torch.no_grad():
        walk.start(RefitImages(labelled(images), labelled(images)))
        node = next(n for n in walk.lockstep.nodes if n.name == "second")
        train = walk.advance(node, sites["second"], 0).train
    # second's input is also its shortcut here
    target = seen["dense out"] + seen["dense in"] - seen["compressed in"]
    geometry = sites["second"].geometry
    rows = torch.cat(
        [patch_rows(seen["compressed in"], geometry), output_rows(target, geometry)], dim=2
    ).double()
    torch.testing.assert_close(train.moments.mean, rows.mean(1), rtol=1e-4, atol=1e-5)
    centred = rows - rows.mean(1, keepdim=True)
    torch.testing.assert_close(
        train.moments.covariance, centred.mT @ centred / rows.shape[1], rtol=1e-3, atol=1e-5
    )


def test_refitting_lowers_the_error_of_the_whole_network(network: Network, images: Tensor) -> None:
    factors = factors_of(network, images[:36], RANKS)
    before = copy.deepcopy(network.model.state_dict())
    given = RefitImages(labelled(images[:36], 9), labelled(images[36:], 12))
    new, outcome = refit(traced_of(network), factors, given)
    assert any(new[n] is not factors[n] for n in factors)
    for name, change in outcome.items():
        assert change.after <= change.before
        assert (change.after < change.before) == (new[name] is not factors[name])
    with torch.no_grad():
        wanted = network.model(images).log_softmax(1)
        old, now = (
            (wanted.exp() * (wanted - rewritten(network, f)(images).log_softmax(1))).sum()
            for f in (factors, new)
        )
    assert now < old
    for key, value in network.model.state_dict().items():
        assert torch.equal(value, before[key]), f"the dense network's {key} was changed"


def test_spilling_to_disk_changes_nothing(network: Network, images: Tensor) -> None:
    factors = factors_of(network, images, RANKS)
    given = RefitImages(labelled(images[:36], 9), labelled(images[36:], 12))
    found = [
        refit(traced_of(network), factors, given, RefitSettings(cache_bytes=cap))[0]
        for cap in (1 << 30, 0)
    ]
    for name in factors:
        for a, b in zip(found[0][name].fit.weights, found[1][name].fit.weights, strict=True):
            assert torch.equal(a, b)


def test_a_frontier_keeps_to_its_cap(tmp_path: Path) -> None:
    frontier = Frontier(cap=4 * 100, folder=tmp_path)
    tensors = [torch.full((60,), float(i)) for i in range(3)]
    for i, tensor in enumerate(tensors):
        frontier.put(i, {"x": Pair(tensor, tensor), "y": Pair(tensor[:1], tensor[:1] + 1)})
    assert frontier.used <= frontier.cap
    assert len(list(tmp_path.iterdir())) == 2
    for i in reversed(range(3)):
        assert torch.equal(frontier.look(i)["y"].dense, tensors[i][:1])
        environment = frontier.take(i)
        assert torch.equal(environment["x"].dense, tensors[i])
        assert environment["x"].same
        assert environment["y"].compressed == i + 1
    assert frontier.used == 0
    assert not list(tmp_path.iterdir())


def test_what_is_needed_later_stays_where_it_is(tmp_path: Path) -> None:
    frontier = Frontier(cap=0, folder=tmp_path)
    x, skip = torch.ones(4), torch.zeros(4)
    frontier.put(0, {"x": Pair(x, x), "skip": Pair(skip, skip + 1)})
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    taken = frontier.take(0, {"x"})
    assert set(taken) == {"x"}
    (left,) = tmp_path.iterdir()
    frontier.put(0, {"y": taken["x"]})
    assert left.stat().st_mtime_ns == files[left]
    assert set(frontier.look(0)) == {"y", "skip"}
    assert torch.equal(frontier.take(0)["skip"].compressed, skip + 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cap", [0, 1 << 20])
def test_values_that_share_memory_go_on_sharing_it(tmp_path: Path, cap: int) -> None:
    frontier = Frontier(cap, tmp_path)
    base, other = torch.zeros(6), torch.zeros(2)
    halves = Pair(base.split(3), base.split(3))
    values = {"parts": halves, "other": Pair(other, other), "part": Pair(base[:3], base[3:])}
    frontier.put(0, values)
    taken = frontier.take(0, {"part"})
    assert set(taken) == {"parts", "part"}
    taken["part"].dense.add_(1)
    assert taken["parts"].dense[0].tolist() == [1, 1, 1]
    assert taken["parts"].dense[1].tolist() == [0, 0, 0]
    assert set(frontier.take(0)) == {"other"}


class Skipping(nn.Module):
    """A shortcut over everything, as a U-Net has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6))
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = skip = self.first(x).relu()
        for layer in self.inner:
            x = layer(x).relu()
        return self.head(torch.cat([skip, x], 1)).mean((2, 3))


def test_a_shortcut_is_not_written_again_for_every_layer(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    real = Frontier._write

    def write(self: Frontier, values: Environment) -> Path:
        written.extend(values)
        return real(self, values)

    monkeypatch.setattr(Frontier, "_write", write)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = prepare(Skipping().eval(), torch.randn(1, 3, 9, 9))
    names = [f"inner.{i}" for i in range(6)]
    factors = factors_of(network, images, dict.fromkeys(names, ("output", 3)))
    given = RefitImages(labelled(images[:36]), labelled(images[36:]))
    refit(traced_of(network), factors, given, RefitSettings(cache_bytes=0))
    # For each of the two batches: when it is made, and when the first of the layers has read it.
    assert written.count("relu") == 2 * 2
    assert len(written) == 2 * (1 + 2 + 5)  # with the images, and what the other layers read


def test_long_patches_are_fitted_to_fewer_rows_at_fewer_strengths() -> None:
    def patch(channels: int) -> Geometry:
        return Geometry("conv2d", channels, 64, (3, 3))

    assert most_rows(patch(128)) == ROWS  # 1,152 numbers, as in the networks of the benchmarks
    assert ridges(patch(128)) == RIDGES
    assert most_rows(patch(256)) == 8 * 2304
    assert most_rows(patch(512)) == 8 * 4608
    assert most_rows(patch(150)) == int(ROWS * (1200 / 1350) ** 2)
    assert set(ridges(patch(256))) < set(RIDGES)


def test_layers_that_are_too_large_are_left_to_the_joint_refit(
    network: Network, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not too_large(Geometry("linear", 4096, 4096))
    assert too_large(Geometry("linear", 9216, 4096))
    assert too_large(Geometry("conv2d", 1024, 64, (3, 3)))
    factors = factors_of(network, images[:36], RANKS)
    given = RefitImages(labelled(images[:36]), labelled(images[36:]))
    assert set(refit(traced_of(network), factors, given)[1]) == set(factors)
    monkeypatch.setattr(regression, "MOST_TOGETHER", 8)
    found, outcome = refit(traced_of(network), factors, given)
    assert outcome == {}
    assert all(found[name] is factors[name] for name in factors)


def test_a_long_patch_is_fitted_as_well_as_a_short_one(
    network: Network, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = factors_of(network, images[:36], RANKS)
    given = RefitImages(labelled(images[:36], 9), labelled(images[36:], 12))
    _, expected = refit(traced_of(network), factors, given)
    monkeypatch.setattr(regression, "LONG_PATCH", 1)
    monkeypatch.setattr(regression, "ROWS_PER_NUMBER", 1 << 16)
    _, found = refit(traced_of(network), factors, given)
    for name in RANKS:
        assert found[name].after == pytest.approx(expected[name].after, rel=0.02)
    assert any(change.after < change.before for change in found.values())


def test_a_full_disk_while_spilling_is_an_error_that_says_where(tmp_path: Path) -> None:
    pair = Pair(torch.zeros(4), torch.ones(4))
    with pytest.raises(ArtefactError, match="set TMPDIR") as caught:
        Frontier(cap=0, folder=tmp_path / "gone").put(0, {"x": pair})
    assert str(tmp_path / "gone") in str(caught.value)
