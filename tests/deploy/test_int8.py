"""Versions of an ONNX model in eight bits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compress.deploy.file import ONNX, ExportedFile, Form, make_file
from compress.deploy.int8 import Quantiser
from compress.deploy.runtimes import onnx_session
from compress.errors import ModelError


class Net(nn.Module):
    """A layer of every kind that has weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.tokens = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(torch.relu(self.grouped(torch.relu(self.conv(x))))))
        return self.head(torch.relu(self.tokens(x.flatten(2).transpose(1, 2))).mean(1))


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, ExportedFile]:
    torch.manual_seed(0)
    model = Net().eval()
    return model, make_file(model, torch.randn(2, 3, 8, 8), Form(ONNX), {"compress": "{}"})


@pytest.fixture
def quantiser(made: tuple[nn.Module, ExportedFile], tmp_path: Path) -> Quantiser:
    generator = torch.Generator().manual_seed(1)
    batches = [{"input": torch.randn(8, 3, 8, 8, generator=generator)} for _ in range(2)]
    onnx_model = made[1].onnx
    assert onnx_model is not None
    return Quantiser(onnx_model, batches, tmp_path)


def kinds(content: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(content).graph.node)


def test_layers_and_their_macs_are_those_of_torch(
    made: tuple[nn.Module, ExportedFile], quantiser: Quantiser
) -> None:
    assert len(quantiser.layers) == 5
    assert {"conv", "grouped", "up", "head"} <= set(quantiser.layers.values())
    counter = FlopCounterMode(display=False)
    with counter:
        made[0](torch.randn(1, 3, 8, 8))
    assert sum(quantiser.macs.values()) == counter.get_total_flops() // 2


def test_eight_bits_are_near_and_layers_can_be_left_out(
    made: tuple[nn.Module, ExportedFile], quantiser: Quantiser
) -> None:
    model, file = made
    inputs = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(inputs)

    def apart(content: bytes) -> float:
        found = file.traced.on(onnx_session(content), next(model.parameters()))(inputs)
        return float((found - expected).norm() / expected.norm())

    everything, nothing = quantiser.without(()), quantiser.without(tuple(quantiser.layers))
    one = quantiser.only(next(iter(quantiser.layers)))
    assert 1e-4 < apart(everything) < 0.1
    assert 1e-5 < apart(one) < apart(everything)
    assert apart(nothing) < apart(everything) / 2  # sums and means still have eight bits
    assert not any(
        "weight_quantized" in t.name for t in onnx.load_from_string(nothing).graph.initializer
    )
    assert 0 < kinds(one)["QuantizeLinear"] < kinds(everything)["QuantizeLinear"]


def test_weights_have_a_scale_for_each_channel(quantiser: Quantiser) -> None:
    proto = onnx.load_from_string(quantiser.without(()))
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    scales = [
        stored[node.input[1]]
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0].startswith("grouped.weight")
    ]
    assert [list(scale.dims) for scale in scales] == [[8]]
    assert stored["grouped.weight_quantized"].data_type == onnx.TensorProto.INT8


def test_sums_do_not_overflow_where_processors_add_in_16_bits(tmp_path: Path) -> None:
    """Products of pairs that are as large as can be, in every sum of a layer."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.fill_(1.0)
            layer.bias.zero_()
    inputs = torch.ones(4, 64)
    file = make_file(model, inputs, Form(ONNX), {})
    assert file.onnx is not None
    content = Quantiser(file.onnx, [{"input": inputs}], tmp_path).without(())
    found = file.traced.on(onnx_session(content), next(model.parameters()))(inputs)
    with torch.no_grad():
        torch.testing.assert_close(found, model(inputs), rtol=0.02, atol=0)
    weights = [
        numpy_helper.to_array(tensor)
        for tensor in onnx.load_from_string(content).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2
    ]
    assert len(weights) == 2
    assert all(abs(w.astype(int)).max() <= 64 for w in weights)


def test_the_file_keeps_its_metadata(quantiser: Quantiser) -> None:
    model = quantiser.finished(quantiser.without(()), {"compress.int8": "[]"})
    found = {entry.key: entry.value for entry in model.proto.metadata_props}
    assert found == {"compress": "{}", "compress.int8": "[]"}


def test_a_network_without_weights_is_refused(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    file = make_file(Scaled().eval(), torch.randn(2, 3), Form(ONNX), {})
    assert file.onnx is not None
    with pytest.raises(ModelError, match="no layer with weights"):
        Quantiser(file.onnx, [{"input": torch.randn(2, 3)}], tmp_path)
