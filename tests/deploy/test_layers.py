"""Single layers as ONNX files, against torch on every layer, geometry and scheme."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, random_chains
from torch import nn

from compress.deploy.engines import engine_named
from compress.deploy.layers import INPUT, layer_file
from compress.deploy.runtimes import onnx_session


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_layers_and_chains_compute_what_torch_does(case: Case) -> None:
    layer, inputs = case.layer().float(), case.inputs().float()
    for each in (layer, *random_chains(case.layer(), 3).values()):
        content = layer_file(each.float(), inputs.shape)
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            assert content is None
            continue
        assert content is not None
        (found,) = onnx_session(content)({INPUT: inputs})
        expected = each(inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [nn.Sequential(), nn.Sequential(nn.Linear(3, 2), nn.ReLU()), nn.Identity(), nn.LSTM(3, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_what_is_no_plain_layer_has_no_file(layer: nn.Module) -> None:
    assert layer_file(layer, (2, 3)) is None


def test_a_subclass_is_not_taken_for_its_base() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer, inputs = Scaled(3, 2), torch.randn(4, 3)
    assert layer_file(layer, (4, 3)) is None
    built = engine_named("onnxruntime").layer(layer, inputs)  # by an export of the whole
    torch.testing.assert_close(built(inputs), layer(inputs))
