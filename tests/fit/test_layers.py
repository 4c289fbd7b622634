"""From a plan to a rewritten model: what is predicted where samples were few."""

from __future__ import annotations

from collections import OrderedDict

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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: dict[str, nn.Module] = {
            "conv": nn.Conv2d(2, 12, 3), "relu": nn.ReLU(), "flatten": nn.Flatten(),
            "linear": nn.Linear(12 * 9, 40), "wide": nn.Linear(40, 50),
        }  # fmt: skip
    model = nn.Sequential(OrderedDict(layers))
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


def test_layers_left_dense_are_refitted_unless_they_are_kept_on_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The report tells which; plan and report agree about the others, bit for bit."""
    stop_the_clock(monkeypatch)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip
        coarse = torch.randn(96, 1, 3, 3)
    images = nn.functional.interpolate(coarse, size=8, mode="bilinear")
    changed = {}
    for keep in ((), ("6",)):
        made = compress.compress_model(model, images, macs=0.7, keep=keep, schemes=("output",))
        layers = {x.name: x for x in made.result.layers}
        assert layers["4"].rewritten
        for name in ("0", "6", "10"):
            assert not layers[name].rewritten
            mine, original = made.model.get_submodule(name), model.get_submodule(name)
            differs = not torch.equal(
                mine.get_parameter("weight"), original.get_parameter("weight")
            )
            assert layers[name].refitted == differs
            changed[name, keep] = differs
        assert made.plan["6"].locked == bool(keep)
    assert changed["6", ()]
    assert not changed["6", ("6",)]
    assert not changed["10", ()]  # alone behind the pooling, in no stretch
