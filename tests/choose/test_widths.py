"""Widths and ranks within one budget, against trying all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrowable import NETWORKS, narrower_of, prepared, recipe_of, smooth
from oracles import unbeaten
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress.calibrate.removal import Narrower
from compress.choose import Chooser, widths
from compress.choose.budgets import Budgets
from compress.config import make_config
from compress.data import Loader, as_images, split
from compress.errors import BudgetError
from compress.fit.layers import Fitter
from compress.network.baseline import Network, prepare
from compress.network.sites import LayerSite
from compress.plan import NARROWER, Choice, Plan
from compress.rules.macs import BY_MACS
from compress.rules.params import BY_PARAMS

CURRENCIES = {"macs": BY_MACS, "params": BY_PARAMS}
Widths = Mapping[str, int]
Count = Callable[[Widths], int]
# Of each layer, how many inputs and outputs it has where groups are so wide; written by hand.
LAYERS: dict[str, dict[str, tuple[Count, Count]]] = {
    "chain": {
        "layers.0": (lambda _: 3, lambda w: w["layers.0"]),
        "layers.2": (lambda w: w["layers.0"], lambda w: w["layers.2"]),
        "layers.5": (lambda w: w["layers.2"], lambda w: w["layers.5"]),
        "layers.9": (lambda w: w["layers.5"], lambda _: 5),
    },
    "mobile": {
        "stem": (lambda _: 3, lambda w: w["stem"]),
        "expand": (lambda w: w["stem"], lambda w: w["expand"]),
        "depthwise": (lambda w: w["expand"], lambda w: w["expand"]),
        "squeeze": (lambda w: w["expand"], lambda w: w["squeeze"]),
        "excite": (lambda w: w["squeeze"], lambda w: w["expand"]),
        "project": (lambda w: w["expand"], lambda w: w["stem"]),
        "head": (lambda w: w["stem"], lambda _: 5),
    },
    "joined": {
        "left": (lambda _: 3, lambda w: w["left"]),
        "right": (lambda _: 3, lambda w: w["right"]),
        "both": (lambda w: w["left"] + w["right"], lambda w: w["both"]),
        "head": (lambda w: 16 * w["both"], lambda _: 5),
    },
}


@dataclass(frozen=True)
class Setting:
    """A network with statistics, and a currency."""

    name: str
    currency: str
    network: Network
    narrower: Narrower

    def budgets(self, **given: object) -> Budgets:
        config = make_config({"schemes": ("output", *NARROWER), self.currency: 0.5, **given})
        network, calibration = self.network, self.narrower.calibration
        chooser = Chooser.of(network, calibration, config)
        return chooser.budgets(CURRENCIES[self.currency])

    @cached_property
    def own(self) -> Budgets:
        return self.budgets()

    def sized(self, site: LayerSite, io: tuple[int, int], rank: int | None) -> float:
        """What a layer costs, counted by hand for the output scheme."""
        geometry = site.geometry
        taps = math.prod(geometry.kernel_size)
        inputs, outputs = io
        each = 1 if geometry.groups > 1 else inputs
        numbers = taps * each * outputs if rank is None else rank * (taps * each + outputs)
        if self.currency == "params":
            whole = (geometry.in_channels, geometry.out_channels)
            got = rank is not None or (geometry.groups == 1 and io != whole)
            return numbers + (outputs if site.biased or got else 0)
        return numbers * site.positions

    def total(self) -> float:
        return float(self.network.macs if self.currency == "macs" else self.network.params)

    def loss(self, choices: list[Choice]) -> float:
        """What a plan is predicted to lose: its widths, and its ranks."""
        by_name = {c.name: c for c in choices}
        lost = 0.0
        for group in self.network.channels.groups:
            width = by_name[group.producers[0].name].width
            lost += self.narrower.removal(group.name).loss(
                group.size if width is None else width[1]
            )
        for choice in choices:
            if choice.factored:
                found = self.own.found[choice.name]
                lost += next(c.loss for c in found if c.ranks == choice.ranks)
        return lost

    @cached_property
    def tried(self) -> tuple[np.ndarray, np.ndarray]:
        """Cost and loss of every pattern of widths with every candidate of every layer."""
        assert self.own.widths is not None
        groups = {o.group.name: o for o in self.own.widths.options}
        costs, losses = [], []
        for pattern in itertools.product(*(o.widths for o in groups.values())):
            w = dict(zip(groups, pattern, strict=True))
            cost = np.zeros(1)
            lost = np.array([sum(self.narrower.removal(g).loss(n) for g, n in w.items())])
            for name, (inputs, outputs) in LAYERS[self.name].items():
                site, io = self.network.site(name), (inputs(w), outputs(w))
                options = [(self.sized(site, io, None), 0.0)]
                limit = min(math.prod(site.geometry.kernel_size) * io[0], io[1])
                options += [
                    (self.sized(site, io, c.ranks[0]), c.loss)
                    for c in self.own.found.get(name, [])
                    if c.ranks and c.ranks[0] < limit
                ]
                each = np.array(options)
                cost, lost = unbeaten(cost, lost, each)
            costs.append(cost)
            losses.append(lost)
        cost, lost = np.concatenate(costs), np.concatenate(losses)
        elsewhere = self.total() - sum(
            self.sized(s, (s.geometry.in_channels, s.geometry.out_channels), None)
            for s in self.network.sites
        )
        return cost + elsewhere, lost

    def optimum(self, fraction: float) -> float:
        cost, lost = self.tried
        return float(lost[cost <= fraction * self.total() + 1e-6].min())


@cache
def setting(name: str, currency: str = "macs") -> Setting:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widths, "GRID", 5)
        network, _ = prepared(name)
        found = Setting(
            name, currency, network, narrower_of(network, smooth(64, NETWORKS[name][1]))
        )
        assert found.own.widths is not None  # made with few widths
        return found


def cost(setting: Setting, choices: list[Choice]) -> float:
    """What the network costs with a plan, by what its choices say."""
    by = setting.currency
    dense = sum(getattr(c, f"dense_{by}") for c in choices)
    return setting.total() - dense + sum(getattr(c, by) for c in choices)


CASES = [("chain", "macs"), ("chain", "params"), ("mobile", "macs"), ("joined", "macs")]
# How much worse than the best a plan may be.
SLACK = 1.02
each_case = pytest.mark.parametrize(("name", "currency"), CASES)


@each_case
def test_as_good_as_trying_everything(name: str, currency: str) -> None:
    s = setting(name, currency)
    alone = s.budgets(schemes=("output",))
    assert alone.widths is None
    narrowed = 0
    for fraction in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97):
        try:
            choices = s.own.spend(fraction)
        except BudgetError:
            assert (s.tried[0] > fraction * s.total()).all()
            continue
        assert cost(s, choices) <= fraction * s.total() + 1e-6
        found, best = s.loss(choices), s.optimum(fraction)
        assert best * (1 - 1e-9) <= found <= best * SLACK + 1e-12, fraction
        narrowed += any(c.width is not None for c in choices)
        try:
            ranks = alone.spend(fraction)
        except BudgetError:
            continue
        assert found <= s.loss(ranks) * (1 + 1e-9)
    assert narrowed >= 3


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.sampled_from(CASES), st.floats(0.02, 1.0))
def test_never_over_the_budget_and_all_widths_agree(case: tuple[str, str], fraction: float) -> None:
    s = setting(*case)
    if fraction < s.own.smallest():
        with pytest.raises(BudgetError, match="smallest reachable") as caught:
            s.own.spend(fraction)
        named = float(str(caught.value).split("fraction is ")[1].split(". ")[0])
        assert cost(s, s.own.spend(named)) <= named * s.total() + 1e-6
        return
    choices = {c.name: c for c in s.own.spend(fraction)}
    assert cost(s, list(choices.values())) <= fraction * s.total() + 1e-6
    w = {}
    for group in s.network.channels.groups:
        width = choices[group.name].width
        w[group.name] = group.size if width is None else width[1]
    for name, (inputs, outputs) in LAYERS[s.name].items():
        site, choice = s.network.site(name), choices[name]
        io = (inputs(w), outputs(w))
        whole = (site.geometry.in_channels, site.geometry.out_channels)
        assert (choice.width or whole) == io
        assert (choice.width is None) == (io == whole)
        rank = choice.ranks[0] if choice.factored else None
        assert getattr(choice, s.currency) == s.sized(site, io, rank)
    assert s.own.spend(fraction) == list(choices.values())


def test_bounds_are_never_above_what_exact_ranks_come_to() -> None:
    """Or patterns that are better would be passed over; and they are near it."""
    s = setting("mobile")
    assert s.own.widths is not None
    for fraction in (0.4, 0.6, 0.8):
        room = fraction * s.own.total - s.own.fixed
        whole = room + s.own._fixed_layers({})
        patterns, price = s.own.widths.patterns(whole)
        beside = s.own.widths.beside(patterns[1], price, whole)
        assert [bound for bound, _ in beside] == sorted(bound for bound, _ in beside)
        own = {o.group.name: o.group.size for o in s.own.widths.options}
        for bound, pattern in beside[::7]:
            changed = [g for g in own if pattern.get(g) != patterns[1].get(g)]
            assert 1 <= len(changed) <= 2
            spent = s.own._ranked(pattern, room)
            assert spent is None or spent.loss >= bound - 1e-12


def test_a_whole_budget_changes_nothing_that_would_lose() -> None:
    choices = setting("chain").own.spend(1.0)
    assert all(not c.rewritten and c.width is None for c in choices)


@pytest.mark.parametrize("name", list(LAYERS))
def test_costs_are_what_torch_counts_of_the_network_that_a_plan_comes_to(name: str) -> None:
    s = setting(name)
    images = smooth(24, NETWORKS[name][1])
    images_of = split(as_images(images), 24, 0)
    fitter = Fitter(s.network, images_of, Loader(8), recipe_of(s.network), refit=False)
    for fraction in (0.45, 0.7):
        choices = s.own.spend(fraction)
        assert any(c.width is not None for c in choices)
        plan = Plan("macs", fraction, "loss", tuple(choices))
        model = fitter.carry_out(plan, s.narrower.calibration).model
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images[:1])
        assert counter.get_total_flops() == 2 * cost(s, choices)
        assert counter.get_total_flops() <= 2 * fraction * s.total()
        dense = sum(c.dense_params for c in choices)
        params = s.network.params - dense + sum(c.params for c in choices)
        # Norms and activations are no layers: what they lose is not counted on.
        saved = sum(
            p.numel() - model.get_submodule(name).get_parameter(n).numel()
            for name, module in s.network.model.named_modules()
            if isinstance(module, nn.BatchNorm2d | nn.PReLU)
            for n, p in module.named_parameters()
        )
        assert sum(p.numel() for p in model.parameters()) == params - saved


def wide() -> Setting:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 20, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5),
    )  # fmt: skip
    network = prepare(model.eval(), torch.zeros(1, 3, 8, 8))
    return Setting("wide", "macs", network, narrower_of(network, smooth(32, (3, 8, 8))))


def test_widths_are_multiples_where_asked_or_where_there_are_many() -> None:
    s = wide()
    for given_, multiples in (
        ({}, (8, 1)),
        ({"round_to": 4}, (4, 4)),
        ({"round_to": 16}, (16, 16)),
    ):
        budgets = s.budgets(**given_)
        assert budgets.widths is not None
        for option, multiple in zip(budgets.widths.options, multiples, strict=True):
            assert option.widths[-1] == option.group.size
            assert list(option.widths) == sorted(set(option.widths))
            assert all(w % multiple == 0 for w in option.widths[:-1])
            assert option.losses[-1] == 0
            assert list(option.losses) == sorted(option.losses, reverse=True)
        for choice in budgets.spend(0.5):
            for w, whole in zip(choice.width or (), (3, 64, 20, 5), strict=False):
                assert w % min(multiples) == 0 or w in (3, 64, 20, 5), whole
            site = s.network.site(choice.name).geometry
            multiple = given_.get("round_to", 1)
            assert all(r % multiple == 0 or r == site.full_rank for r in choice.ranks)


@pytest.mark.parametrize(
    "fixed",
    [{"keep": ("squee*",)}, {"scheme": {"squeeze": "output"}}, {"rank": {"squeeze": "2"}}],
    ids=["keep", "scheme", "rank"],
)
def test_what_the_user_says_of_a_member_leaves_its_groups(fixed: dict[str, object]) -> None:
    """Squeeze reads the hidden channels and makes its own: only the stream is left to narrow."""
    s = setting("mobile")
    budgets = s.budgets(**fixed)
    assert budgets.widths is not None
    assert [o.group.name for o in budgets.widths.options] == ["stem"]
    choices = {c.name: c for c in budgets.spend(0.4)}
    for name in ("depthwise", "squeeze", "excite"):
        assert choices[name].width is None
    if "keep" in fixed:
        assert not choices["squeeze"].rewritten
        assert choices["squeeze"].locked
    if "rank" in fixed:
        assert choices["squeeze"].ranks == (2,)


@pytest.mark.parametrize("member", ["depthwise", "head", "excite"])
def test_any_member_will_do(member: str) -> None:
    s = setting("mobile")
    budgets = s.budgets(keep=(member,))
    assert budgets.widths is not None
    left = {g.name for g in s.network.channels.groups if member in g.modules}
    free = {o.group.name for o in budgets.widths.options}
    assert free == {g.name for g in s.network.channels.groups} - left


def test_nothing_is_left_to_narrow_where_all_is_kept() -> None:
    budgets = setting("mobile").budgets(keep=("stem", "expand", "squeeze"))
    assert budgets.widths is None


def test_layers_that_lose_more_than_promised_are_dearer() -> None:
    s = setting("chain")
    before = s.own.spend(0.5)
    same = s.own.dearer({})
    assert same.spend(0.5) == before
    dear = s.own.dearer({c.name: 1e6 for c in before if c.name == "layers.5"})
    after = {c.name: c for c in dear.spend(0.5)}
    assert after["layers.5"].width is None or after["layers.5"].width[0] == 10
    assert not after["layers.5"].factored
    doubled = s.own.dearer(dict.fromkeys((c.name for c in before), 2.0))
    assert [replace(c, reason="") for c in doubled.spend(0.5)] == [
        replace(c, reason="") for c in before
    ]
