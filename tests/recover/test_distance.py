"""What a network is trained and judged by, against the formulas written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.errors import ModelError
from compress.recover.distance import Distance
from compress.running.outputs import Part, Reading


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reading(*parts: Part) -> Reading:
    return Reading(parts, "", False)


def test_classes_are_compared_at_a_temperature() -> None:
    old, new = drawn(5, 4), drawn(5, 4, seed=1)
    distance = Distance(reading(Part("", "classes")), temperature=3.0)
    taught = distance.taught(old)
    expected = 0.0
    for before, after in zip(old.tolist(), new.tolist(), strict=True):
        p, q = ([math.exp(x / 3) for x in row] for row in (before, after))
        p, q = ([x / sum(row) for x in row] for row in (p, q))
        expected += 9 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 5
    assert float(distance.training(taught, new, 5)) == pytest.approx(expected, rel=1e-5)
    assert float(distance.held_out(taught, new, 5).mean()) == pytest.approx(expected, rel=1e-5)
    assert distance.held_out(taught, new, 5).shape == (5,)


def test_answers_are_compared_one_by_one() -> None:
    old, new = drawn(3, 2), drawn(3, 2, seed=1)
    expected = 0.0
    for a, b in zip(old.flatten().tolist(), new.flatten().tolist(), strict=True):
        p, q = (1 / (1 + math.exp(-x)) for x in (a, b))
        expected += (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 3
    distance = Distance(reading(Part("", "answers")))
    taught = distance.taught(old)
    assert float(distance.training(taught, new, 3)) == pytest.approx(expected, rel=1e-5)
    assert float(distance.held_out(taught, new, 3).mean()) == pytest.approx(expected, rel=1e-5)


def test_values_of_several_outputs_add_up_by_their_weight() -> None:
    old = {"a": drawn(3, 2), "b": drawn(3, 4, 4, seed=1)}
    new = {"a": drawn(3, 2, seed=2), "b": drawn(3, 4, 4, seed=3)}
    distance = Distance(reading(Part("a", "values", weight=2.0), Part("b", "values", weight=0.5)))
    expected = float(
        (old["a"] - new["a"]).square().sum() + 0.25 * (old["b"] - new["b"]).square().sum()
    )
    taught = distance.taught(old)
    assert float(distance.training(taught, new, 3)) == pytest.approx(expected / 3, rel=1e-5)
    assert float(distance.held_out(taught, new, 3).sum()) == pytest.approx(expected, rel=1e-5)


def test_without_a_reading_each_output_counts_the_same() -> None:
    old = {"boxes": 100 * drawn(2, 3), "scores": drawn(2, 5, seed=1)}
    new = {"boxes": old["boxes"] * 1.1, "scores": old["scores"] * 1.1}
    distance = Distance(reading())
    assert float(distance.training(distance.taught(old), new, 2)) == pytest.approx(0.02, rel=1e-5)
    fewer: dict[str, Any] = {"boxes": new["boxes"][:, :2], "scores": new["scores"]}
    with pytest.raises(ModelError, match="--loss-fn"):
        distance.training(distance.taught(old), fewer, 2)
    with pytest.raises(ModelError, match="--loss-fn"):
        distance.training(drawn(3), drawn(3, seed=1), 3)


def test_a_function_of_ones_own_gets_the_whole_results() -> None:
    def function(outputs: Any, originals: Any) -> Tensor:
        found: Tensor = (outputs["a"] - originals["a"]).abs().sum()
        return found

    old, new = {"a": drawn(4, 2)}, {"a": drawn(4, 2, seed=1)}
    distance = Distance(reading(Part("a", "values")), function=function)
    taught = distance.taught(old)
    expected = float((old["a"] - new["a"]).abs().sum()) / 4
    assert float(distance.training(taught, new, 4)) == pytest.approx(expected)
    with torch.no_grad():
        assert float(distance.held_out(taught, new, 4).mean()) == pytest.approx(expected)


def test_boxes_of_as_many_images_may_differ_in_number() -> None:
    """As of a detector that finds three things in one image and one in another."""
    old = [{"boxes": 10 * drawn(3, 4)}, {"boxes": 10 * drawn(1, 4, seed=1)}]
    new = [{"boxes": x["boxes"] * 1.1} for x in old]
    distance = Distance(reading())
    assert float(distance.training(old, new, 2)) == pytest.approx(0.02, rel=1e-5)
    found = distance.held_out(old, new, 2)
    assert found.tolist() == pytest.approx([0.02, 0.02], rel=1e-5)


def test_outputs_of_another_shape_are_refused() -> None:
    distance = Distance(reading(Part("", "values")))
    with pytest.raises(ModelError, match="--loss-fn"):
        distance.training(distance.taught(drawn(2, 3)), drawn(2, 4), 2)


def test_a_function_of_ones_own_cannot_change_what_the_original_said() -> None:
    def function(outputs: Tensor, originals: Tensor) -> Tensor:
        return (outputs - originals.zero_()).square().sum()

    taught = drawn(2, 3)
    before = taught.clone()
    distance = Distance(reading(Part("", "values")), function=function)
    distance.training(taught, drawn(2, 3, seed=1), 2)
    distance.held_out(taught, drawn(2, 3, seed=1), 2)
    assert torch.equal(taught, before)
