"""Refitting the factors between two cuts of the graph together."""

from __future__ import annotations

import copy

import pytest
import torch
from test_refit import Residual, factors_of, rewritten
from torch import Tensor, nn

from compress import segments
from compress.cuts import find_segments
from compress.linalg.fit import Problem, chain_matrix, fit, with_weights
from compress.linalg.geometry import Geometry
from compress.network import Network, prepare
from compress.refit import Factors
from compress.segments import refit_segments

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


def batches(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(8)]


def improved(network: Network, images: Tensor, factors: dict[str, Factors], **changes: object):  # type: ignore[no-untyped-def]
    assert network.graph is not None
    sites = {site.name: site for site in network.sites}
    return refit_segments(
        network.model, network.graph, sites, factors,
        batches(images[:64]), batches(images[64:]), **changes,
    )  # fmt: skip


def until_pooled(model: nn.Module, x: Tensor) -> Tensor:
    """What the head reads, in either network."""
    seen: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def test_a_graph_is_cut_where_one_tensor_goes_on(network: Network) -> None:
    assert network.graph is not None
    nodes = list(network.graph.nodes)
    by_name = {name: name for name in ("stem", "first", "second")}
    (whole,) = find_segments(network.graph, network.model, by_name)
    # The second alone is no stretch, and inside a block two tensors go on: image and shortcut.
    assert whole.layers == ("stem", "first")
    assert nodes[whole.start].op == "placeholder"
    assert nodes[whole.end].target == "relu"
    assert nodes[whole.end + 1].target == "second"
    assert find_segments(network.graph, network.model, {"second": "second"}) == []
    later = {name: name for name in ("first", "second")}
    (whole,) = find_segments(network.graph, network.model, later)
    assert nodes[whole.end + 1].target == "head"


def test_the_plain_error_falls_on_images_that_nothing_was_fitted_to(
    network: Network, images: Tensor, factors: dict[str, Factors], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on the rewritten models, at the cut that the stretch is fitted for."""
    monkeypatch.setattr(segments, "EPOCHS", 20)
    ranks = {"first": RANKS["first"], "second": RANKS["second"]}
    start = {name: factors[name] for name in ranks}
    found = improved(network, images, start, weigh=False)
    assert any(found[name] is not start[name] for name in start)
    held_out = images[64:]
    wanted = until_pooled(network.model, held_out)
    before, after = (
        float((until_pooled(rewritten(network, f), held_out) - wanted).square().sum())
        for f in (start, found)
    )
    assert after < 0.95 * before


def test_what_gets_no_better_stays(
    network: Network, images: Tensor, factors: dict[str, Factors], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "STEP", 100.0)
    found = improved(network, images, factors)
    assert all(found[name] is factors[name] for name in factors)


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
    for name, factor in found.items():
        assert torch.equal(factor.fit.matrix, again[name].fit.matrix)


def test_spilling_to_disk_changes_nothing(
    network: Network, images: Tensor, factors: dict[str, Factors]
) -> None:
    memory, disk = (improved(network, images, factors, cache_bytes=n) for n in (1 << 30, 0))
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
    old = fit(Problem(geometry, weight, outputs, eye), scheme, ranks)
    changed = tuple(w * (10.0 ** (1 - k)) + 0.1 for k, w in enumerate(old.weights))
    new = with_weights(geometry, old, changed)
    torch.testing.assert_close(new.matrix, chain_matrix(geometry, scheme, changed))
    first, last = new.weights[0].flatten(2), new.weights[1].flatten(3)
    torch.testing.assert_close(first.norm(dim=2), last.norm(dim=(1, 3)), rtol=1e-6, atol=0)
