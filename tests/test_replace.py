"""From a plan to a rewritten model: what is predicted where samples were few."""

from __future__ import annotations

import pytest
import torch
from stopwatch import stop_the_clock
from torch import nn

import compress


@pytest.mark.parametrize("metric", ["loss", "mse"])
@pytest.mark.parametrize("rank", ["conv=2", "linear=3", "wide=4"])
def test_the_held_out_prediction_is_what_held_out_images_measure(
    monkeypatch: pytest.MonkeyPatch, metric: str, rank: str
) -> None:
    """Of patches and of outputs; the mean of the held-out rows is another than that of the seen."""
    stop_the_clock(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(2, 12, 3))
    model.add_module("relu", nn.ReLU())
    model.add_module("flatten", nn.Flatten())
    model.add_module("linear", nn.Linear(12 * 9, 40))
    model.add_module("wide", nn.Linear(40, 50))
    images = torch.randn(16, 2, 5, 5, generator=generator)
    images[::3] += 1
    name, _, ranks = rank.partition("=")
    made = compress.compress_model(
        model, images, rank={name: ranks}, metric=metric, refit=False, force_rank=True
    )
    layer = next(x for x in made.result.layers if x.name == name)
    assert layer.samples_per_dimension is not None
    assert layer.samples_per_dimension < 10
    assert layer.errors.validation_alone is not None
    assert layer.predicted_held_out_mse == pytest.approx(
        layer.errors.validation_alone.mse, rel=1e-4
    )
    assert layer.predicted_mse is not None
    assert abs(layer.predicted_held_out_mse / layer.predicted_mse - 1) > 0.01


def test_none_is_given_where_samples_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_the_clock(monkeypatch)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))
    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    made = compress.compress_model(model, images, rank={"0": "2"}, refit=False)
    assert made.result.layers[0].predicted_mse
    assert made.result.layers[0].predicted_held_out_mse is None
