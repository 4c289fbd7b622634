"""Budgets whose choice is checked on validation images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from networks.narrow import settled, vgg
from stopwatch import stop_the_clock
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from workbench import made_images

import compress
from compress.calibrate.held_out import HeldOutLoss
from compress.measure import assess
from compress.pipeline import promised
from compress.pipeline.outcome import Compressed

Losses = Mapping[str, HeldOutLoss]


def images(count: int) -> Tensor:
    pixels, _ = made_images(count, seed=1)
    return torch.tensor(pixels).unsqueeze(1).float() / 255


def run(count: int = 48) -> Compressed:
    return compress.compress_model(
        settled(vgg()),
        images(count),
        macs=0.6,
        refit=False,
        no_latency=True,
        schemes=("output", "narrow"),
    )


class Watched:
    """Answers in the place of `ratios`, and notes what it was asked."""

    def __init__(self, *answers: dict[str, float]) -> None:
        self.answers = [*answers]
        self.asked: list[tuple[dict[str, float], tuple[Losses, ...]]] = []

    def __call__(self, predicted: Mapping[str, float], *measured: Losses) -> dict[str, float]:
        self.asked.append((dict(predicted), measured))
        return self.answers.pop(0) if self.answers else {}


@pytest.fixture(autouse=True)
def no_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_the_clock(monkeypatch)


def test_what_loses_more_than_promised_is_chosen_less(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Watched()
    monkeypatch.setattr(promised, "ratios", kept)
    before = run().plan
    assert len(kept.asked) == 1
    predicted, measured = kept.asked[0]
    rewritten = {c.name for c in before.choices if c.rewritten}
    second_order, alone = measured
    assert predicted.keys() == second_order.keys() == alone.keys() == rewritten
    worst = max(predicted, key=lambda name: predicted[name])
    watched = Watched({worst: 1e6})
    monkeypatch.setattr(promised, "ratios", watched)
    after = run().plan
    assert len(watched.asked) == 2
    losses = watched.asked[1][0]
    assert losses.get(worst, 0.0) < 1e-3 * predicted[worst]
    assert sum(c.macs for c in after.choices) <= 0.6 * sum(c.dense_macs for c in after.choices)
    assert after["3"] != before["3"] or after["6"] != before["6"]


def test_losses_alone_are_measured_where_they_are_in_the_units_of_the_prediction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched = Watched()
    monkeypatch.setattr(promised, "ratios", watched)
    compress.compress_model(
        settled(vgg()), images(48), macs=0.6, refit=False, no_latency=True, metric="mse"
    )
    ((_, measured),) = watched.asked
    assert len(measured) == 1


class Sure(nn.Module):
    """Is sure of every image, so that its slopes are near zero but for a few."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.scores = (nn.Linear(n, 8, bias=False) for n in (64, 8))
        generator = torch.Generator().manual_seed(0)
        for layer in (self.parts, self.scores):
            nn.init.orthogonal_(layer.weight, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return 100 * self.scores(self.parts(x.flatten(1)))


def test_losses_that_slopes_do_not_show_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched()
    monkeypatch.setattr(promised, "ratios", watched)
    shown = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    given = TensorDataset(shown, Sure()(shown).argmax(1))
    compress.compress_model(
        Sure(),
        given,
        macs=0.5,
        schemes=("output",),
        refit=False,
        no_latency=True,
        augment=False,
    )
    predicted, (second_order, alone) = watched.asked[0]
    assert alone["parts"].mean > 2 * second_order["parts"].mean
    assert alone["parts"].mean > 2 * predicted["parts"]


def test_losses_alone_are_the_same_however_few_large_pictures_come_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure = assess.measured_losses
    found: list[tuple[list[int], Losses]] = []

    def noted(network: Any, model: Any, names: Any, batches: Any, *rest: Any) -> Losses:
        losses = measure(network, model, names, batches, *rest)
        found.append(([len(inputs) for inputs in batches], losses))
        return losses

    monkeypatch.setattr(assess, "measured_losses", noted)
    monkeypatch.setattr(promised, "ratios", lambda *_: {})
    for pictures in (8, 3):
        monkeypatch.setattr(assess, "MOST_PIXELS", pictures * 8 * 8)
        torch.manual_seed(0)
        run()
    at_once, few = (next(lost for size, lost in found if size == of) for of in ([8], [3, 3, 2]))
    assert at_once.keys() == few.keys()
    for name, loss in at_once.items():
        assert few[name].mean == pytest.approx(loss.mean, rel=1e-5)
        assert few[name].error == pytest.approx(loss.error, rel=1e-5)


def test_it_is_chosen_anew_a_few_times_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{i}" for i in (3, 6, 10, 12, 0)]
    watched = Watched(*({name: 1e6} for name in names))
    monkeypatch.setattr(promised, "ratios", watched)
    run()
    assert 2 <= len(watched.asked) <= promised.ROUNDS
    # All that there is, dearer by as much: the same again, and that is the end of it.
    alike = Watched(*(dict.fromkeys(names, 2.0) for _ in range(5)))
    monkeypatch.setattr(promised, "ratios", alike)
    run()
    assert len(alike.asked) == 1


def test_few_validation_images_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched()
    monkeypatch.setattr(promised, "ratios", watched)
    run(4 * (promised.LEAST_IMAGES - 1))  # a quarter are for validation
    assert not watched.asked
    run(4 * promised.LEAST_IMAGES)
    assert watched.asked
