"""One trace of a network: its names, an open batch, and what cannot be traced."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from compress.deploy.program import plain_names, trace
from compress.errors import ModelError
from compress.running.structure import tensors


@dataclass
class Found:
    scores: Tensor
    aux: tuple[Tensor, Tensor]


class Two(nn.Module):
    """Two inputs, one of which may be left out, and a structure of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 1), nn.Linear(5, 4)

    def forward(self, image: Tensor, tokens: Tensor | None = None, scale: float = 1.0) -> Found:
        seen = self.conv(image) * scale
        words = torch.zeros(1, 4) if tokens is None else self.linear(tokens)
        return Found(seen.mean((2, 3)), (seen, words))


def test_paths_become_names_and_no_two_are_the_same() -> None:
    assert plain_names([""], "output") == ("output",)
    paths = ["out.aux", "[1].scores", "['a b']", "out_aux", "out.aux"]
    expected = ("out_aux", "output_1_scores", "a_b", "out_aux_2", "out_aux_3")
    assert plain_names(paths, "output") == expected
    assert plain_names([""], "input", taken=["input"]) == ("input_2",)


@pytest.mark.parametrize("by_name", [False, True])
def test_structures_are_named_and_the_batch_is_open(*, by_name: bool) -> None:
    torch.manual_seed(0)
    model = Two().eval()
    image, tokens = torch.randn(2, 3, 4, 4), torch.randn(2, 5)
    example = {"image": image, "tokens": tokens} if by_name else (image, tokens)
    traced = trace(model, example)
    assert traced.inputs == ("image", "tokens")
    assert traced.outputs == ("scores", "aux_0", "aux_1")
    for count in (1, 2, 7):
        image, tokens = torch.randn(count, 3, 4, 4), torch.randn(count, 5)
        found = traced.program.module()(image, tokens)
        expected = tensors(model(image, tokens))
        assert list(found) == list(traced.outputs)
        for one, other in zip(found.values(), expected.values(), strict=True):
            torch.testing.assert_close(one, other)


def test_a_single_tensor_is_returned_as_one() -> None:
    traced = trace(nn.Linear(5, 4).eval(), torch.randn(2, 5))
    assert (traced.inputs, traced.outputs) == (("input",), ("output",))
    assert traced.program.module()(torch.randn(3, 5)).shape == (3, 4)


def test_what_is_no_tensor_keeps_the_example_s_value() -> None:
    model = Two().eval()
    example = {"image": torch.randn(2, 3, 4, 4), "tokens": None, "scale": 3.0}
    traced = trace(model, example)
    assert traced.inputs == ("image",)
    image = torch.randn(5, 3, 4, 4)
    found = traced.program.module()(image)
    torch.testing.assert_close(found["scores"], model(image, scale=3.0).scores)


class OfThatBatch(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as nn.Linear calls it
        return super().forward(input).reshape(2, 2, 2)


def test_a_forward_bound_to_its_batch_asks_for_a_fixed_one() -> None:
    model, example = OfThatBatch(5, 4).eval(), torch.randn(2, 5)
    with pytest.raises(ModelError, match="--fixed-batch N"):
        trace(model, example)
    assert trace(model, example, 2).program.module()(torch.randn(2, 5)).shape == (2, 2, 2)


class Decides(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) if input.sum() > 0 else input[:, :4]


def test_a_forward_that_decides_by_its_data_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match="decides by the values of its data") as caught:
        trace(Decides(5, 4).eval(), torch.rand(2, 5))
    assert "test_program.py" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # torch would print the graph so far


def test_the_network_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model, torch.randn(2, 5))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
