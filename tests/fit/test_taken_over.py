"""A plan that follows another fits only the layers that it treats in another way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from narrowable import NETWORKS, narrower_of, plan_of, prepared, recipe_of, smooth

from compress.calibrate.statistics import Calibration
from compress.data import Loader, as_images, split
from compress.fit.layers import Fitted, Fitter, _Layer
from compress.plan import Choice, Plan

COUNT = 64
Ranks = dict[str, tuple[str, tuple[int, ...]]]
# Of each network: a plan, one that follows, and the layers that these treat in different ways.
FOLLOWING: dict[str, tuple[dict[str, int], Ranks, dict[str, int], Ranks, set[str]]] = {
    "chain": (
        {"layers.0": 5, "layers.5": 5}, {"layers.2": ("spatial", (5,))},
        {"layers.0": 5, "layers.5": 5}, {"layers.2": ("spatial", (4,))},
        {"layers.2"},
    ),
    "joined": (
        {"left": 3, "both": 5}, {},
        {"left": 4, "both": 5}, {},
        {"left", "both"},
    ),
}  # fmt: skip


def setting(name: str) -> tuple[Fitter, Calibration, list[Plan]]:
    network, _ = prepared(name)
    images = smooth(COUNT, NETWORKS[name][1])
    fitter = Fitter(network, split(as_images(images), COUNT, 0), Loader(16), recipe_of(network))
    first_widths, first_ranks, widths, ranks, _ = FOLLOWING[name]
    plans = [plan_of(network, first_widths, first_ranks), plan_of(network, widths, ranks)]
    return fitter, narrower_of(network, images).calibration, plans


def numbers(fitted: Fitted) -> list[torch.Tensor]:
    factors = fitted.factors
    return [t for n in sorted(factors) for t in (*factors[n].fit.weights, factors[n].bias)]


@pytest.mark.parametrize("name", list(FOLLOWING))
def test_only_what_changes_is_fitted_and_comes_out_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitter, calibration, (first, second) = setting(name)
    asked: list[str] = []
    really = _Layer.fit

    def noted(layer: _Layer, choice: Choice, *, pooled: bool) -> object:
        asked.append(choice.name)
        return really(layer, choice, pooled=pooled)

    monkeypatch.setattr(_Layer, "fit", noted)
    fitter.fit(first, calibration)
    assert asked == [c.name for c in first.choices if c.name in calibration.statistics]
    asked.clear()
    after = fitter.fit(second, calibration)
    assert set(asked) == FOLLOWING[name][-1]
    asked.clear()
    same = fitter.fit(second, calibration)
    assert not asked
    alone = fitter.fit(second, replace(calibration, fits={}))
    assert after.predicted == same.predicted == alone.predicted
    for ours, again, theirs in zip(numbers(after), numbers(same), numbers(alone), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, again)
