"""Refitting the factors between two cuts of the graph together."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from refitting import Residual, factors_of, labelled, rewritten, traced_of
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from compress.fit import stretches
from compress.fit.cuts import Segment, find_segments, join
from compress.fit.factors import Factors
from compress.fit.frontier import Frontier, Pair
from compress.fit.jointly import Improved, Movable, refit_jointly
from compress.fit.stretches import StretchWalk, pieces
from compress.fit.walk import RefitImages, RefitSettings
from compress.linalg.fit import Covariances, Problem, chain_matrix, fit, with_weights
from compress.linalg.geometry import Geometry
from compress.linalg.steps import Steps
from compress.network.baseline import Network, prepare

RANKS = {"stem": ("spatial", 4), "first": ("input", 4), "second": ("output", 4)}


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return prepare(Residual().eval(), torch.randn(1, 3, 9, 9))


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    smooth = torch.randn(96, 3, 3, 3, generator=generator)
    return nn.functional.interpolate(smooth, size=9, mode="bilinear")


@pytest.fixture(scope="module")
def factors(network: Network, images: Tensor) -> dict[str, Factors]:
    return factors_of(network, images[:64], RANKS)


def improved(
    network: Network,
    images: Tensor,
    factors: dict[str, Factors],
    *,
    size: int = 8,
    free: tuple[str, ...] = (),
    settings: RefitSettings = RefitSettings(),
) -> Improved:
    given = RefitImages(labelled(images[:64], size), labelled(images[64:], size))
    return refit_jointly(traced_of(network), Movable(factors, free), given, settings)


def until_pooled(model: nn.Module, x: Tensor) -> Tensor:
    """What the pooling before the head reads, in either network."""
    seen: list[Tensor] = []
    handle = model.get_submodule("relu").register_forward_hook(
        lambda _, __, output: seen.append(output.clone())
    )
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[-1]


def positions_of(network: Network) -> list[int]:
    """By torch's own propagation of shapes."""
    assert network.graph is not None
    module = fx.GraphModule(network.model, network.graph)
    ShapeProp(module).propagate(network.example)
    shapes = [node.meta["tensor_meta"].shape for node in [*module.graph.nodes][:-1]]
    return [*(shape.numel() // shape[1] for shape in shapes), 0]  # of one image


def test_a_graph_is_cut_where_one_tensor_goes_on(network: Network) -> None:
    assert network.graph is not None
    nodes, positions = list(network.graph.nodes), positions_of(network)
    by_name = {name: name for name in ("stem", "first", "second")}
    whole, rest = find_segments(network.graph, network.model, by_name, positions)
    # Inside a block two tensors go on: image and shortcut.
    assert whole.layers == ("stem", "first")
    assert nodes[whole.start].op == "placeholder"
    assert nodes[whole.end].target == "relu"
    assert nodes[whole.end + 1].target == "second"
    assert rest == Segment(whole.end, rest.end, ("second",))  # the head sees one position an image
    alone = find_segments(network.graph, network.model, {"first": "first"}, [7] * len(nodes))
    assert alone == []
    assert find_segments(network.graph, network.model, {}, positions) == []


class Sized(nn.Module):
    """Reads sizes at its start and uses them inside and at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.fourth = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        count, size = x.size(0), x.shape[-2:]
        x = self.second(torch.relu(self.first(x)))
        x = nn.functional.interpolate(torch.relu(x), size=size)
        x = self.fourth(torch.relu(self.third(x)).view(count, 8, *size))
        return self.head(torch.relu(x).mean((2, 3)).view(count, -1))


def test_sizes_read_at_the_start_do_not_join_everything(images: Tensor) -> None:
    torch.manual_seed(0)
    network = prepare(Sized().eval(), torch.randn(1, 3, 9, 9))
    ranks = dict.fromkeys(("first", "second", "third", "fourth"), ("output", 3))
    found = factors_of(network, images[:64], ranks)
    walk = StretchWalk(traced_of(network), Frontier(1 << 30, Path()))
    walk.start(RefitImages(labelled(images[:5]), []))
    positions = [value.positions for value in walk.values()]
    segments = find_segments(network.graph, network.model, {n: n for n in ranks}, positions)
    assert [s.layers for s in segments] == [("first", "second"), ("third", "fourth")]
    assert [walk.reads_numbers(s) for s in segments] == [False, True]
    # Of 96 images in batches of 10 the last is smaller, so sizes differ.
    better = improved(network, images, found, size=10)
    changed = {n for n in ranks if better.factors[n] is not found[n]}
    assert changed

    def error(factors: dict[str, Factors]) -> float:
        model = rewritten(network, factors)
        with torch.no_grad():
            return float((model(images[64:]) - network.model(images[64:])).square().mean())

    assert error(better.factors) < error(found)


def test_large_maps_take_fewer_images(
    network: Network, images: Tensor, factors: dict[str, Factors], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stretches, "STEP_POSITIONS", 81 * 6)
    seen: list[int] = []
    through = StretchWalk.through

    def counted(walk: StretchWalk, segment: Segment, batch: int, given: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(len(given))
        return through(walk, segment, batch, given)

    monkeypatch.setattr(StretchWalk, "through", counted)
    one, two = (improved(network, images, factors) for _ in range(2))
    assert 6 in seen
    assert set(seen) <= {6, 8}
    for name, found in one.factors.items():
        assert torch.equal(found.fit.matrix, two.factors[name].fit.matrix)


def test_a_stretch_ends_before_a_pooling(network: Network) -> None:
    assert network.graph is not None
    nodes = list(network.graph.nodes)
    by_name = {name: name for name in ("first", "second")}
    (whole,) = find_segments(network.graph, network.model, by_name, positions_of(network))
    assert nodes[whole.end].target == "relu"
    assert nodes[whole.end + 1].target == "mean"
    # Where no position is lost it reaches on to what the next layer reads.
    (whole,) = find_segments(network.graph, network.model, by_name, [7] * len(nodes))
    assert nodes[whole.end + 1].target == "head"


def test_positions_are_those_of_one_image(network: Network, images: Tensor, tmp_path: Path) -> None:
    walk = StretchWalk(traced_of(network), Frontier(1 << 30, tmp_path))
    walk.start(RefitImages(labelled(images[:5]), []))
    *found, output = walk.values()
    assert [value.positions for value in found] == positions_of(network)[:-1]
    assert output.positions == 0


def parts_at(*ends: int, start: int = 0) -> list[Segment]:
    """Stretches of two layers that follow each other."""
    starts = (start, *ends[:-1])
    return [Segment(a, b, (f"{b}a", f"{b}b")) for a, b in zip(starts, ends, strict=True)]


def spans(segments: list[Segment]) -> list[tuple[int, int, int]]:
    return [(s.start, s.end, len(s.layers)) for s in segments]


def test_stretches_that_follow_each_other_are_joined_but_for_the_last() -> None:
    parts, many = parts_at(2, 4, 6, 8), [16] * 9
    assert spans(join(parts, 1, many)) == spans(parts)
    assert spans(join(parts, 2, many)) == [(0, 4, 4), (4, 6, 2), (6, 8, 2)]
    assert spans(join(parts, 4, many)) == [(0, 6, 6), (6, 8, 2)]
    apart = [*parts_at(2), *parts_at(5, 7, 8, start=3)]
    assert spans(join(apart, 4, many)) == [(0, 2, 2), (3, 7, 4), (7, 8, 2)]


def test_none_goes_to_a_single_position_and_single_layers_are_joined_or_left_out() -> None:
    parts = parts_at(2, 4, 6, 8)
    pooled = [16] * 5 + [1] * 4
    assert spans(join(parts, 4, pooled)) == [(0, 2, 2), (2, 4, 2), (4, 8, 4)]
    single = [*parts[:2], Segment(4, 6, ("last",)), Segment(6, 8, ("head",))]
    assert spans(join(single, 4, [16] * 7 + [1] * 2)) == [(0, 6, 5)]


@pytest.mark.parametrize("free", [(), ("stem",)])
def test_the_plain_error_falls_on_images_that_nothing_was_fitted_to(
    network: Network, images: Tensor, factors: dict[str, Factors], free: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Measured on the rewritten models, at the cut that the stretch is fitted for."""
    monkeypatch.setattr(stretches, "EPOCHS", 20)
    start = {name: factors[name] for name in ("first", "second")}
    found = improved(network, images, start, free=free, settings=RefitSettings(weigh=False))
    assert any(found.factors[name] is not start[name] for name in start)
    assert set(found.kept) == set(free)
    held_out = images[64:]
    wanted = until_pooled(network.model, held_out)
    before, after = (
        float((until_pooled(model, held_out) - wanted).square().sum())
        for model in (rewritten(network, start), rewritten(network, found.factors, found.kept))
    )
    assert after < 0.95 * before


def distance(network: Network, found: Improved, images: Tensor) -> float:
    """How far a rewritten network's outputs are from the original's."""
    model = rewritten(network, found.factors, found.kept)
    with torch.no_grad():
        return float((model(images) - network.model(images)).square().mean())


def test_further_images_bring_others_nearer_in_as_many_steps(
    network: Network, images: Tensor, factors: dict[str, Factors], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight images are learnt by heart; with 56 more each is seen an eighth as often."""
    monkeypatch.setattr(stretches, "EPOCHS", 120)
    monkeypatch.setattr(stretches, "LEAST_EPOCHS", 15)
    taken: list[int] = []
    step = Steps.step

    def counted(self: Steps, rate: float) -> bool:
        taken[-1] += 1
        return step(self, rate)

    monkeypatch.setattr(Steps, "step", counted)
    found = {}
    for further in (0, 56):
        taken.append(0)
        sets = (images[:8], images[64:80], images[8 : 8 + further])
        given = RefitImages(*(labelled(part, 8) if len(part) else [] for part in sets))
        found[further] = refit_jointly(traced_of(network), Movable(factors), given, RefitSettings())
        assert found[further].further == further
    assert taken[0] == taken[1]
    unseen = images[80:]
    assert distance(network, found[56], unseen) < 0.9 * distance(network, found[0], unseen)


def test_further_images_are_as_many_as_memory_holds_and_are_worth_it(
    network: Network, images: Tensor, factors: dict[str, Factors]
) -> None:
    read: list[int] = []

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            read.append(8)
            yield images[:8], torch.zeros(8, dtype=torch.long)

    def learned(cache_bytes: int) -> int:
        sets = labelled(images[:16], 8), labelled(images[64:72], 8)
        given = RefitImages(*sets, endless())
        settings = RefitSettings(cache_bytes=cache_bytes)
        return refit_jointly(traced_of(network), Movable(factors), given, settings).further

    assert learned(1 << 30) == 48  # three times as many
    # The one stretch gives 8 channels of 81 positions, and each network feeds it 3 of them; 24
    # images have to be there anyhow.
    each = 4 * 81 * (8 + 3 + 3)
    assert learned(24 * each) == 0
    assert learned(40 * each) == 16
    assert sum(read) <= 48 + 8 + 16 + 8
    assert learned(0) == 0


def test_a_free_layer_changes_its_values_and_nothing_else(
    network: Network, images: Tensor, factors: dict[str, Factors]
) -> None:
    start = {name: factors[name] for name in ("first", "second")}
    found = improved(network, images, start, free=("stem", "head"))
    old = network.model.get_submodule("stem")
    new = rewritten(network, found.factors, found.kept).get_submodule("stem")
    assert type(new) is type(old)
    assert repr(new) == repr(old)
    for name, parameter in old.named_parameters():
        other = new.get_parameter(name)
        assert other.requires_grad == parameter.requires_grad
        assert not torch.equal(other, parameter)
    assert "head" not in found.kept  # alone behind the pooling, in no stretch


def test_what_gets_no_better_stays(
    network: Network, images: Tensor, factors: dict[str, Factors], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stretches, "STEP", 100.0)
    found = improved(network, images, factors, free=("head",))
    assert all(found.factors[name] is factors[name] for name in factors)
    assert not found.kept


def test_the_network_and_the_random_state_are_left_alone(
    network: Network, images: Tensor, factors: dict[str, Factors]
) -> None:
    before, state = copy.deepcopy(network.model.state_dict()), torch.get_rng_state()
    found = improved(network, images, factors)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in network.model.state_dict().items():
        assert torch.equal(value, before[name])
    for parameter in network.model.parameters():
        assert parameter.grad is None
    again = improved(network, images, factors)
    for name, factor in found.factors.items():
        assert torch.equal(factor.fit.matrix, again.factors[name].fit.matrix)


def test_the_batches_do_not_matter(
    network: Network, images: Tensor, factors: dict[str, Factors]
) -> None:
    """Up to the order of sums, which the held-out comparison might still turn over."""
    one, other = (improved(network, images, factors, size=n, free=("head",)) for n in (8, 50))
    for name, factor in one.factors.items():
        assert factor is not factors[name]
        torch.testing.assert_close(
            factor.fit.matrix, other.factors[name].fit.matrix, rtol=1e-2, atol=1e-3
        )


@pytest.mark.parametrize(("sizes", "wanted"), [
    ([5, 5, 2], [4, 4, 4]), ([70, 3], [32, 32, 9]), ([24], [16, 8]), ([1, 1], [1, 1]), ([], []),
])  # fmt: skip
def test_pieces_are_equal_parts_of_a_step(sizes: list[int], wanted: list[int]) -> None:
    numbers = torch.arange(sum(sizes))
    given = [(part.unsqueeze(1), part) for part in torch.split(numbers, sizes)] if sizes else []
    found = list(pieces(given))
    assert [len(x) for x, _ in found] == wanted
    if wanted:
        assert torch.equal(torch.cat([x for x, _ in found]).squeeze(1), numbers)
        assert torch.equal(torch.cat([y for _, y in found]), numbers)


def test_pieces_hold_inputs_of_one_size() -> None:
    """As a collate function makes them that pads to the longest of a batch."""
    given = [(torch.zeros(5, 3), torch.arange(5)), (torch.zeros(5, 4), torch.arange(5, 10))]
    found = list(pieces(given))
    assert [tuple(x.shape) for x, _ in found] == [(4, 3), (1, 3), (4, 4), (1, 4)]
    assert torch.cat([y for _, y in found]).tolist() == list(range(10))


def test_spilled_views_take_no_more_than_they_hold(tmp_path: Path) -> None:
    everything = torch.randn(1000, 50)
    frontier = Frontier(0, tmp_path)
    frontier.put(0, {"x": Pair(everything[3:5], everything[3:5])})
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 10_000
    assert torch.equal(frontier.look(0)["x"].dense, everything[3:5])


def test_spilling_to_disk_changes_nothing(
    network: Network, images: Tensor, factors: dict[str, Factors]
) -> None:
    memory, disk = (
        improved(network, images, factors, settings=RefitSettings(cache_bytes=n)).factors
        for n in (1 << 30, 0)
    )
    for name, factor in memory.items():
        assert torch.equal(factor.fit.matrix, disk[name].fit.matrix)
        assert torch.equal(factor.bias, disk[name].bias)


@pytest.mark.parametrize(("scheme", "ranks"), [("spatial", (3,)), ("two_sided", (2, 3))])
def test_other_factors_are_balanced_and_multiply_to_the_same(
    scheme: str, ranks: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    geometry = Geometry("conv2d", 4, 5, (3, 3))
    weight = torch.randn(1, 5, 4, 3, 3, generator=generator, dtype=torch.float64)
    eye = torch.eye(36, dtype=torch.float64).unsqueeze(0)
    outputs = weight.flatten(2) @ weight.flatten(2).mT
    old = fit(Problem(geometry, weight, Covariances(outputs, eye)), scheme, ranks)
    changed = tuple(w * (10.0 ** (1 - k)) + 0.1 for k, w in enumerate(old.weights))
    new = with_weights(geometry, old, changed)
    torch.testing.assert_close(new.matrix, chain_matrix(geometry, scheme, changed))
    first, last = new.weights[0].flatten(2), new.weights[1].flatten(3)
    torch.testing.assert_close(first.norm(dim=2), last.norm(dim=(1, 3)), rtol=1e-6, atol=0)
