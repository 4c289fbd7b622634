"""Refits of networks with channels taken out, and whether a refit helped the whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from narrowable import NETWORKS, narrower_of, plan_of, prepared, recipe_of, smooth
from torch import Tensor, nn

from compress.calibrate.removal import Narrower
from compress.data import Loader, as_images, split
from compress.fit import layers
from compress.fit.factors import Factors, partly
from compress.fit.frontier import Pair
from compress.fit.in_order import _InOrder
from compress.fit.jointly import Improved, Movable
from compress.fit.layers import Fitter, Replaced
from compress.fit.lockstep import Lockstep
from compress.fit.regression import Rows
from compress.fit.walk import Traced
from compress.fit.whole import best_share, divergences
from compress.layers import registered_kind
from compress.linalg.geometry import output_rows
from compress.network.baseline import Network
from compress.network.sites import LayerSite
from compress.plan import Plan
from compress.running.outputs import read_outputs

# Of each network, widths of groups, and ranks of layers on top of them.
PLANS: dict[str, tuple[dict[str, int], dict[str, tuple[str, tuple[int, ...]]]]] = {
    "mobile": ({"stem": 4, "expand": 7, "squeeze": 3}, {"project": ("output", (2,))}),
    "joined": ({"left": 3, "right": 3, "both": 5}, {"both": ("spatial", (6,))}),
    "tokens": ({"up": 9}, {"head": ("output", (2,))}),
    "chain": ({"layers.0": 5, "layers.2": 6, "layers.5": 5}, {"layers.2": ("spatial", (5,))}),
    "upscaled": ({"down": 4, "up": 5}, {}),
}
COUNT = 256


@cache
def setting(name: str) -> tuple[Network, Tensor, Narrower]:
    network, _ = prepared(name)
    images = smooth(COUNT, NETWORKS[name][1])
    return network, images, narrower_of(network, images[:192])


def fitter_of(name: str, **settings: Any) -> Fitter:
    network, images, _ = setting(name)
    return Fitter(
        network, split(as_images(images), COUNT, 0), Loader(16), recipe_of(network), **settings
    )


def plan(name: str, **settings: Any) -> Plan:
    return plan_of(setting(name)[0], *PLANS[name], **settings)


@cache
def refitted(name: str) -> Replaced:
    return fitter_of(name).carry_out(plan(name), setting(name)[2].calibration)


def apart(network: Network, models: list[nn.Module], images: Tensor) -> list[float]:
    """The mean squared distance of outputs, which the outputs' meaning has no say in."""
    with torch.no_grad():
        before = network.model(images)
        return [float((model(images) - before).square().mean()) for model in models]


@pytest.mark.parametrize("name", list(PLANS))
def test_both_networks_run_side_by_side(name: str) -> None:
    network, images, narrower = setting(name)
    assert network.graph is not None
    cut, _ = narrower.cut(PLANS[name][0])
    lockstep = Lockstep(network.model, network.graph)
    for width in cut.widths:
        for alias in width.aliases:
            lockstep.chains[alias] = cut.model.get_submodule(width.name)
    output = next(n for n in lockstep.nodes if n.op == "output").all_input_nodes[0]
    with torch.no_grad():
        environment = {lockstep.nodes[0].name: Pair(images, images)}
        lockstep.run(environment, lockstep.nodes[1:-1])
        pair = environment[output.name]
        torch.testing.assert_close(pair.dense, network.model(images))
        torch.testing.assert_close(pair.compressed, cut.model(images))


@pytest.mark.parametrize("name", ["mobile", "chain"])
def test_a_refit_helps_on_images_that_nothing_was_fitted_to(name: str) -> None:
    network, _, _ = setting(name)
    found = refitted(name)
    fresh = smooth(64, NETWORKS[name][1], seed=9)
    after, before = apart(network, [found.model, found.fitted], fresh)
    assert found.refitted
    assert found.refit.path == "graph"
    assert after < before
    for width in found.cut.widths if found.cut else ():
        now, first = (m.get_submodule(width.name) for m in (found.model, found.fitted))
        assert [p.shape for p in now.parameters()] == [p.shape for p in first.parameters()]


@pytest.mark.parametrize("name", ["chain", "joined", "upscaled"])
def test_targets_are_the_outputs_that_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the original on its own inputs; rows are what the narrower network feeds."""
    network, images, narrower = setting(name)
    seen: dict[str, list[Tensor]] = {}
    advance = _InOrder.advance

    def noted(walk: _InOrder, node: Any, site: LayerSite, seed: int) -> Rows:
        targets = seen.setdefault(site.name, [])
        add = Rows.add

        def kept(rows: Rows, patches: Tensor, wanted: Tensor, *, held_out: bool) -> None:
            assert patches.shape[-1] == site.geometry.in_features
            if not held_out:
                targets.append(wanted)
            add(rows, patches, wanted, held_out=held_out)

        with monkeypatch.context() as patch:
            patch.setattr(Rows, "add", kept)
            return advance(walk, node, site, seed)

    monkeypatch.setattr(_InOrder, "advance", noted)
    few = split(as_images(images[:48]), 48, 0)  # of more, positions are drawn
    fitter = replace(fitter_of(name), split=few)
    fitter.carry_out(plan(name), narrower.calibration)
    cut, _ = narrower.cut(PLANS[name][0])
    readers = [name for name in cut.kept if name in cut.sites]
    assert set(readers) <= set(seen)
    fit = torch.stack([image for image, _ in fitter.split.fit])
    for layer in readers:
        outputs: list[Tensor] = []
        module = network.model.get_submodule(layer)
        handle = module.register_forward_hook(lambda _, __, y, o=outputs: o.append(y))
        with torch.no_grad():
            network.model(fit)
        handle.remove()
        if name == "upscaled" and layer in ("up", "side"):
            continue  # added to each other: the second is asked for what the sum lacks
        site = cut.sites[layer]
        kept = registered_kind(module).images(cut.outputs_of(layer, outputs[0]))
        expected = output_rows(kept, site.geometry, None)
        found = torch.cat(seen[layer], 1)
        assert found.shape == expected.shape
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "locked"), [("mobile", "head"), ("chain", "layers.9")])
def test_locked_layers_stay_bit_for_bit(name: str, locked: str) -> None:
    """Layers that read channels that go cannot; all others can."""
    network, _, narrower = setting(name)
    group = {"mobile": "squeeze", "chain": "layers.0"}[name]
    by_hand = plan_of(network, {group: 3}, {}, (locked,))
    assert not by_hand[locked].rewritten
    found = fitter_of(name).carry_out(by_hand, narrower.calibration)
    assert locked not in found.refitted
    mine, original = (m.get_submodule(locked) for m in (found.model, network.model))
    for a, b in zip(mine.parameters(), original.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_refit_is_the_same_twice_and_leaves_the_network_alone() -> None:
    network, _, narrower = setting("chain")
    before = {k: v.clone() for k, v in network.model.state_dict().items()}
    again = fitter_of("chain").carry_out(plan("chain"), narrower.calibration)
    for a, b in zip(
        again.model.state_dict().values(), refitted("chain").model.state_dict().values(),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(a, b)
    assert all(torch.equal(v, before[k]) for k, v in network.model.state_dict().items())


def test_how_far_outputs_are_apart() -> None:
    """Of classes by the information lost, of values by half the squared error, for each image."""
    torch.manual_seed(0)
    first, second = nn.Linear(6, 4), nn.Linear(6, 4)
    images = torch.randn(10, 6)
    with torch.no_grad():
        p, q = first(images).double().softmax(1), second(images).double().softmax(1)
        expected = float((p * (p / q).log()).sum(1).mean())
        reading = read_outputs(first(images), [0] * 10)
    assert reading.kind == "classes"
    for sizes in ([10], [3, 7], [1] * 10):
        found = divergences([first, second, first], images.split(sizes), reading, "contiguous")
        assert found == pytest.approx([0, expected, 0], rel=1e-5, abs=1e-9)
    assert divergences([first, second], [], reading, "contiguous") == [0.0, 0.0]
    assert first.training
    with torch.no_grad():
        shifted = nn.Linear(6, 4)
        shifted.load_state_dict(first.state_dict())
        shifted.bias += 3.0  # all alike: no class is likelier for it
    assert divergences([first, shifted], [images], reading, "contiguous")[1] < 1e-6
    shifted.bias.data[:] = float("nan")
    found = divergences([first, shifted], [images], reading, "contiguous")
    assert found[1] != found[1]


@pytest.mark.parametrize(
    ("apart", "best", "why"),
    [
        ((1.0, 0.4, 0.5), 1.0, ""),
        ((1.0, 0.505, 0.5), 1.0, ""),  # that may be chance
        ((1.0, 0.52, 0.5, 0.6), 0.75, "1.04 times as far"),
        ((1.0, 0.9, 0.6, 0.4, 0.5), 0.5, "2.25 times as far"),
        ((1.0, 1.5, 1.2, 1.1, 1.015), 0.0, "1.5 times as far"),
        ((1.0, 1.0, 1.0), 1.0, ""),
        ((0.0, 0.0), 1.0, ""),
        ((0.0, 3e-15, 0.0), 1.0, ""),  # rounding of a network that is sure of everything
        ((0.0, 1.0), 0.0, "times as far"),
        ((1.0, math.nan, math.inf), 0.0, "not finite"),
        ((1.0, math.nan, 0.5), 0.75, "not finite"),
        ((math.nan, 0.5, math.nan), 1.0, ""),
        ((math.nan, math.nan), 0.0, "not finite"),
    ],
)
def test_the_share_that_is_nearest(apart: tuple[float, ...], best: float, why: str) -> None:
    found, reason = best_share(apart)
    assert found == best
    assert why in reason
    assert bool(reason) == bool(why)


def spoiled(factors: Mapping[str, Factors], scale: float) -> dict[str, Factors]:
    """Factors whose layers give something else by a bias."""
    return {
        n: Factors(f.fit, f.bias + scale * (f.bias + 1), f.weighting) for n, f in factors.items()
    }


ORDER = {"good": 0.0, "bad": 0.5, "broken": float("nan")}


@pytest.mark.parametrize(
    ("first", "second"), [*itertools.product(["good", "bad", "broken"], repeat=2)]
)
def test_what_leaves_the_whole_worse_is_taken_back(
    first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, jointly, or both; also where nothing finite is left."""
    _, _, narrower = setting("mobile")
    real, jointly = layers.refit, layers.refit_jointly

    def in_order(traced: Any, factors: Any, *rest: Any) -> Any:
        found, outcome = real(traced, factors, *rest)[:2]
        worse = found if first == "good" else spoiled(factors, ORDER[first])
        return worse, outcome

    def together(traced: Any, movable: Any, *rest: Any) -> Improved:
        if second == "good":
            # Of what the first came to, unless that is no use.
            return jointly(traced, movable, *rest) if first == "good" else Improved(truth, {})
        return Improved(spoiled(movable.factors, 1.0 if second == "bad" else float("nan")), {})

    truth = {}
    fitter = replace(fitter_of("mobile"), split=split(as_images(smooth(40, (3, 8, 8))), 40, 0))
    fitted = fitter.fit(plan("mobile"), narrower.calibration)
    truth.update(fitted.factors)
    monkeypatch.setattr(layers, "refit", in_order)
    monkeypatch.setattr(layers, "refit_jointly", together)
    found = fitter.replace(fitted)
    assert found.refit.path == "graph"
    if second == "good":
        assert "the joint refit was taken back" not in found.refit.reason
        return
    if first == "good":
        assert "the joint refit was taken back" in found.refit.reason
        assert found.refitted
        assert found.model is not found.fitted
    else:
        assert found.refit.reason.startswith("the refit layer by layer was taken back")
        assert found.model is found.fitted
        assert found.refitted == ()
    image = smooth(4, NETWORKS["mobile"][1])
    with torch.no_grad():
        assert bool(found.model(image).isfinite().all())


def test_of_a_refit_that_goes_too_far_a_part_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes past what is best by as much as that is away: half of the way."""
    _, _, narrower = setting("mobile")
    fitter = replace(fitter_of("mobile"), split=split(as_images(smooth(40, (3, 8, 8))), 40, 0))
    fitted = fitter.fit(plan("mobile"), narrower.calibration)
    best, worse = fitted.factors, spoiled(fitted.factors, 0.5)

    def too_far(traced: Traced, factors: Mapping[str, Factors], *rest: Any) -> Any:
        del rest
        sites = traced.sites
        return {n: partly(f, best[n], 2.0, sites[n].geometry) for n, f in factors.items()}, {}

    def nothing(traced: Traced, movable: Movable, *rest: Any) -> Improved:
        del traced, rest
        return Improved(dict(movable.factors), {})

    monkeypatch.setattr(layers, "refit", too_far)
    monkeypatch.setattr(layers, "refit_jointly", nothing)
    found = fitter.replace(replace(fitted, factors=worse))
    assert found.refit.reason.startswith("the refit layer by layer was kept to 50%, since all")
    assert "joint" not in found.refit.reason
    expected = fitter.replace(fitted).fitted
    image = smooth(4, NETWORKS["mobile"][1])
    with torch.no_grad():
        torch.testing.assert_close(found.model(image), expected(image), rtol=1e-4, atol=1e-5)


def test_without_images_to_judge_there_is_no_refit() -> None:
    _, images, narrower = setting("chain")
    network = setting("chain")[0]
    few = split(as_images(images[:1]), 1, 0)
    found = Fitter(network, few, Loader(1), recipe_of(network)).carry_out(
        plan("chain"), narrower.calibration
    )
    assert found.refit.path == "none"
    assert found.model is found.fitted
