"""Widths under a budget of time, with made-up times, against trying all of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_time import BEGIN, PRODUCT, MadeUpTable, MadeUpTimer, layer_seconds, network_seconds
from narrowable import NETWORKS, narrower_of, plan_of, prepared, recipe_of, smooth
from oracles import unbeaten
from torch import nn

from compress.calibrate.removal import Narrower
from compress.choose import Chooser
from compress.choose.by_time import plan as by_time
from compress.choose.by_time import widths
from compress.choose.by_time.candidates import TimedBudgets
from compress.choose.by_time.sketch import narrowed, sketched
from compress.choose.by_time.widths import TimedCosts, coarse_grid, rest_of_groups, shares
from compress.config import make_config
from compress.data import Loader, as_images, split
from compress.errors import BudgetError
from compress.fit.layers import Fitter
from compress.network.baseline import Network
from compress.network.chains import random_chain
from compress.network.sites import LayerSite
from compress.plan import NARROWER, Candidate, Choice


@dataclass(frozen=True)
class Made:
    """A network with statistics, its timer, and what a budget of time chooses from."""

    network: Network
    narrower: Narrower
    timer: MadeUpTimer

    def budgets(self, **given_: Any) -> TimedBudgets:
        settings_ = {"schemes": ("output", *NARROWER), "round_to": 1, "latency": 0.5, **given_}
        chooser = Chooser.of(self.network, self.narrower.calibration, make_config(settings_))
        timer: Any = self.timer
        (found,) = by_time._Candidates(chooser, timer, MadeUpTable()).budgets(
            "because", narrow=True
        )
        return found

    @cached_property
    def own(self) -> TimedBudgets:
        return self.budgets()

    def pattern(self, choices: list[Choice]) -> dict[str, int]:
        by_name = {c.name: c for c in choices}
        found = {}
        for group in self.network.channels.groups:
            width = by_name[group.producers[0].name].width
            found[group.name] = group.size if width is None else width[1]
        return found

    def loss(self, choices: list[Choice]) -> float:
        lost = sum(self.narrower.removal(g).loss(w) for g, w in self.pattern(choices).items())
        for choice in choices:
            if choice.factored:
                found = self.own.found[choice.name]
                lost += next(c.loss for c in found if c.ranks == choice.ranks)
        return lost

    def chain(self, site: LayerSite, candidate: Candidate, io: tuple[int, int]) -> float:
        """What a chain takes by the rule of the page: each end as the layer itself changes."""
        module = self.dense_layer(site)
        shape = site.input_shape(site.calls[0], self.timer.batch)
        whole = layer_seconds(random_chain(site.geometry, "output", candidate.ranks, module), shape)
        geometry, positions = site.geometry, site.positions
        first = candidate.ranks[0] * geometry.in_channels * math.prod(geometry.kernel_size)
        last = candidate.ranks[0] * geometry.out_channels
        weights = geometry.weight_numel

        def alone(i: float, o: float) -> float:
            return BEGIN + PRODUCT * self.timer.batch * positions * weights * i * o

        i, o = io[0] / geometry.in_channels, io[1] / geometry.out_channels
        ends = (first * alone(i, 1) + last * alone(1, o)) / (first + last)
        return whole * ends / alone(1, 1)

    def dense_layer(self, site: LayerSite) -> nn.Module:
        return self.network.model.get_submodule(site.name)

    @cached_property
    def tried(self) -> tuple[np.ndarray, np.ndarray]:
        """Seconds and loss of every pattern of widths with every candidate of every layer."""
        known = self.own.budgets.widths
        assert known is not None
        groups = {o.group.name: o for o in known.options}
        costs, losses = [], []
        for chosen in itertools.product(*(o.widths for o in groups.values())):
            w = dict(zip(groups, chosen, strict=True))
            small = narrowed(self.timer.dense, self.network, w)
            cost = np.array([network_seconds(small, self.timer.images)])
            lost = np.array([sum(self.narrower.removal(g).loss(n) for g, n in w.items())])
            wide = known.layer_widths(w)
            for name, candidates in self.own.found.items():
                site = self.network.site(name)
                whole = (site.geometry.in_channels, site.geometry.out_channels)
                io = wide.get(name, whole)
                layer = small.get_submodule(name)
                shape = site.input_shape(site.calls[0], self.timer.batch)
                at = 2 if shape[1:2] != (whole[0],) and len(shape) == 3 else 1
                dense = layer_seconds(layer, (*shape[:at], io[0], *shape[at + 1 :]))
                limit = min(math.prod(site.geometry.kernel_size) * io[0], io[1])
                each = np.array(
                    [(0.0, 0.0)]
                    + [
                        (self.chain(site, c, io) - dense, c.loss)
                        for c in candidates
                        if c.ranks and c.ranks[0] < limit
                    ]
                )
                cost, lost = unbeaten(cost, lost, each)
            costs.append(cost)
            losses.append(lost)
        return np.concatenate(costs), np.concatenate(losses)


def made(name: str) -> Made:
    with torch.random.fork_rng():
        network, _ = prepared(name)
    narrower = narrower_of(network, smooth(64, NETWORKS[name][1]))
    return Made(network, narrower, MadeUpTimer(network))


@pytest.fixture(scope="module", params=["chain", "mobile", "joined"])
def few(request: pytest.FixtureRequest) -> Made:
    """A network whose groups have few widths to choose from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widths, "WIDTHS", 4)
        found = made(request.param)
        assert found.own.budgets.widths is not None  # made with few widths
        return found


def test_predicted_times_of_narrow_networks_are_those_of_the_device(few: Made) -> None:
    """The device's times are linear in each width, which interpolation finds out exactly."""
    known = few.own.budgets.widths
    assert known is not None
    names = [o.group.name for o in known.options]
    for chosen in itertools.product(*(o.widths for o in known.options)):
        wide = dict(zip(names, chosen, strict=True))
        at = known.candidates(wide)
        layers = sum(next(c.seconds or 0.0 for c in at[n] if not c.ranks) for n in at)
        fixed = few.own.budgets.fixed + known.fixed(wide) - known.fixed({})
        truth = network_seconds(narrowed(few.timer.dense, few.network, wide), few.timer.images)
        assert fixed + layers == pytest.approx(truth, rel=1e-6)


def test_as_good_as_trying_everything(few: Made) -> None:
    alone = few.budgets(schemes=("output",))
    assert alone.budgets.widths is None
    cost, lost = few.tried
    narrow = 0
    for fraction in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97):
        within = cost <= fraction * few.timer.total * (1 + 1e-9)
        try:
            choices = few.own.spend(fraction)
        except BudgetError:
            assert (cost > fraction * few.timer.total * (1 - 1e-9)).all()
            continue
        best = float(lost[within].min())
        assert best * (1 - 1e-9) <= few.loss(choices) <= best * 1.03 + 1e-12, fraction
        assert few.own.loss(choices) == pytest.approx(few.loss(choices))
        narrow += any(c.width is not None for c in choices)
        try:
            ranks = alone.spend(fraction)
        except BudgetError:
            continue
        assert few.loss(choices) <= few.loss(ranks) * (1 + 1e-9) + 1e-15
    assert narrow >= 3


@settings(derandomize=True, deadline=None, max_examples=6)
@given(st.floats(0.05, 1.0))
def test_never_over_the_budget_as_predicted(few: Made, fraction: float) -> None:
    if fraction < few.own.smallest():
        with pytest.raises(BudgetError, match="smallest reachable"):
            few.own.spend(fraction)
        return
    choices = few.own.spend(fraction)
    assert choices == few.own.spend(fraction)
    small = narrowed(few.timer.dense, few.network, few.pattern(choices))
    seconds = network_seconds(small, few.timer.images)
    wide = few.own.budgets.widths
    assert wide is not None
    for c in choices:
        if c.factored:
            site = few.network.site(c.name)
            io = c.width or (site.geometry.in_channels, site.geometry.out_channels)
            found = next(x for x in few.own.found[c.name] if x.ranks == c.ranks)
            seconds += few.chain(site, found, io) - wide.costs.dense(site, io)
            assert c.seconds == pytest.approx(few.chain(site, found, io))
        elif c.width is not None:
            assert c.dense_seconds is not None
            assert c.seconds is not None
            assert c.seconds < c.dense_seconds
    assert seconds <= fraction * few.timer.total * (1 + 1e-6)


@pytest.mark.parametrize(
    "fixed",
    [{"keep": ("squee*",)}, {"scheme": {"squeeze": "output"}}, {"rank": {"squeeze": "2"}}],
    ids=["keep", "scheme", "rank"],
)
def test_what_the_user_says_of_a_member_leaves_its_groups(fixed: dict[str, Any]) -> None:
    found = made("mobile").budgets(**fixed)
    assert found.budgets.widths is not None
    assert [o.group.name for o in found.budgets.widths.options] == ["stem"]
    choices = {c.name: c for c in found.spend(max(0.7, found.smallest()))}
    for name in ("depthwise", "squeeze", "excite"):
        assert choices[name].width is None
    if "rank" in fixed:
        assert choices["squeeze"].ranks == (2,)


def test_measured_shares_rise_with_both_widths_and_are_linear_between() -> None:
    seconds = np.array([[1.0, 2.0, 9.0], [2.0, 1.5, 4.0], [3.0, 3.0, 4.0]])
    found = shares([2, 4, 8], [1, 3, 4], seconds)
    times = found.times
    # Nothing takes longer than something wider in both; what does not is as measured.
    assert times.tolist() == [[0.25, 0.375, 1.0], [0.375, 0.375, 1.0], [0.75, 0.75, 1.0]]
    assert (np.diff(times, axis=0) >= 0).all()
    assert (np.diff(times, axis=1) >= 0).all()
    one, other = np.array([0.75, 1.0, 0.1]), np.array([1.0, 0.875, 0.1])
    both, inputs, neither, outputs = found.at(one, other).T.tolist()
    assert both == pytest.approx([1.0, 0.875, 0.25])
    assert inputs == neither == [1.0, 1.0, 1.0]
    assert outputs == pytest.approx([1.0, 0.875, 0.75])
    known = shares([8], [1, 2, 4], np.array([[1.0, 1.5, 2.0]]))  # one width of the inputs
    assert known.at(one, other)[:, 1].tolist() == [1.0, 1.0, 1.0]
    assert known.at(one, other)[:, 3].tolist() == pytest.approx([1.0, 0.9375, 0.5])


def test_widths_under_a_budget_of_time_are_few() -> None:
    assert coarse_grid(6, None) == (1, 2, 3, 4, 5, 6)
    assert coarse_grid(16, None) == (4, 8, 12, 16)
    assert coarse_grid(64, None) == (8, 16, 24, 32, 40, 48, 56, 64)
    assert coarse_grid(64, 32) == (32, 64)
    assert coarse_grid(16, 32) == (16,)


def test_what_is_done_with_channels_costs_no_more_than_all_that_is_no_layer() -> None:
    known = made("chain").own.budgets.widths
    assert known is not None
    half = {o.group.name: 0.5 for o in known.options}
    by_numbers = rest_of_groups(known, 4.0, 1.0, half)
    assert sum(by_numbers.values()) == pytest.approx(2.0)
    assert by_numbers["layers.0"] == pytest.approx(by_numbers["layers.2"] * 8 / 10)
    assert set(rest_of_groups(known, 4.0, -1.0, half).values()) == {0.0}
    assert set(rest_of_groups(known, -4.0, 1.0, half).values()) == {0.0}
    assert sum(rest_of_groups(known, 4.0, 99.0, half).values()) <= 4.0


def test_a_layer_that_nothing_is_known_of_takes_what_it_takes() -> None:
    site = made("chain").network.sites[0]
    costs = TimedCosts({}, {})
    found = costs.at_parts(site, [Candidate("dense", (), 0.0, 1, 1, 2.5)])
    assert found(np.array([0.5, 1.0]), np.array([1.0, 0.5])).tolist() == [[2.5], [2.5]]


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_network_that_is_timed_has_the_shape_of_the_one_that_is_fitted(name: str) -> None:
    found = made(name)
    groups = {g.name: max(g.size // 2, 1) for g in found.network.channels.groups}
    assert groups
    last = found.network.sites[-1]
    plan = plan_of(found.network, groups, {last.name: ("output", (2,))})
    images_of = split(as_images(smooth(24, NETWORKS[name][1])), 24, 0)
    fitter = Fitter(found.network, images_of, Loader(8), recipe_of(found.network), refit=False)
    fitted = fitter.carry_out(plan, found.narrower.calibration).model
    timed = sketched(found.network.model, found.network, plan.choices)

    def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
        return {n: tuple(v.shape) for n, v in model.state_dict().items()}

    assert shapes(timed) == shapes(fitted)
    assert shapes(timed) != shapes(found.network.model)
    assert timed(found.network.example).isfinite().all()
