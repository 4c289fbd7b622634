"""ONNX files: the same numbers as torch, the network's own names, nothing of the machine."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import onnx
import pytest
import torch
from cases import CASES, Case, random_chains
from networks.awkward import Plain
from onnx import numpy_helper
from torch import Tensor, nn

from compress.deploy.difference import Difference
from compress.deploy.onnx import OnnxModel, to_onnx
from compress.deploy.parting import first_parting
from compress.deploy.program import Traced, trace
from compress.deploy.runtimes import OnRuntime, onnx_session
from compress.errors import ConfigError, ModelError


def _difference(expected: Tensor, found: Tensor) -> float:
    difference = Difference()
    difference.add(expected, found)
    return difference.largest


def _loaded(model: OnnxModel, traced: Traced, network: nn.Module) -> OnRuntime:
    return traced.on(onnx_session(model.content()), next(network.parameters()))


class Chains(nn.Module):
    """The layer beside what each scheme makes of its shape, with random weights."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([layer, *random_chains(layer, 2).values()])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part(x) for part in self.parts]


class Beside(nn.Module):
    """Networks side by side, each with an input of its own: one trace does for all."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, *inputs: Tensor) -> list[list[Tensor]]:
        return [network(x) for network, x in zip(self.networks, inputs, strict=True)]


def _apart() -> list[Case]:
    """A case of each kind of layer, grouped or not, with each padding mode: what exporters mind."""
    found: dict[tuple[object, ...], Case] = {}
    for case in CASES:
        layer = case.layer()
        grouped = getattr(layer, "groups", 1) > 1
        found.setdefault((type(layer), grouped, getattr(layer, "padding_mode", "")), case)
    return list(found.values())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_every_layer_and_scheme_computes_the_same() -> None:
    cases = _apart()
    network = Beside([Chains(case.layer().float()) for case in cases]).eval()
    inputs = [case.inputs().float() for case in cases]
    inputs = [torch.cat([x, x])[:2] for x in inputs]
    traced = trace(network, tuple(inputs))
    exported = _loaded(to_onnx(traced, {}), traced, network)
    with torch.no_grad():
        expected, found = network(*inputs), exported(*inputs)
    for case, before, after in zip(cases, expected, found, strict=True):
        assert len(after) == len(before) > 1, case.id
        for one, other in zip(before, after, strict=True):
            assert _difference(one, other) < 1e-5, case.id


@cache
def _plain() -> tuple[nn.Module, Traced, OnnxModel]:
    torch.manual_seed(0)
    network = Plain().eval()
    traced = trace(network, torch.randn(2, 1, 8, 8))
    return network, traced, to_onnx(traced, {"compress": '{"rule": "macs"}'})


def test_norms_are_folded_and_weights_keep_their_names() -> None:
    network, _, model = _plain()
    kinds = [node.op_type for node in model.proto.graph.node]
    assert kinds.count("Conv") == 2
    assert not {"BatchNormalization", "Transpose", "Identity", "Cast"} & set(kinds)
    names = {tensor.name for tensor in model.proto.graph.initializer}
    assert {"second.weight", "second.bias", "head.weight", "head.bias"} <= names
    weights = {t.name: numpy_helper.to_array(t) for t in model.proto.graph.initializer}
    assert torch.equal(torch.tensor(weights["head.weight"]), network.head.weight)


def test_a_weight_may_be_called_what_an_operator_is() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mul, self.input = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(3))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.mul + self.input).relu()

    network = Scaled().eval()
    traced = trace(network, torch.randn(2, 3))
    exported = _loaded(to_onnx(traced, {}), traced, network)
    inputs = torch.randn(4, 3)
    with torch.no_grad():
        torch.testing.assert_close(exported(inputs), network(inputs))


def test_the_file_says_what_it_is_and_nothing_of_the_machine() -> None:
    model = onnx.load_from_string(_plain()[2].content())
    assert [(p.key, p.value) for p in model.metadata_props] == [("compress", '{"rule": "macs"}')]
    assert b"awkward.py" not in _plain()[2].content()
    axis = model.graph.input[0].type.tensor_type.shape.dim
    assert [axis[0].dim_param, *(d.dim_value for d in axis[1:])] == ["batch", 1, 8, 8]


def test_equal_networks_give_equal_bytes() -> None:
    network, _, model = _plain()
    again = trace(copy.deepcopy(network), torch.randn(2, 1, 8, 8))
    assert to_onnx(again, {"compress": '{"rule": "macs"}'}).content() == model.content()


def test_an_opset_can_be_chosen_and_one_that_is_too_old_is_refused() -> None:
    traced = _plain()[1]
    model = to_onnx(traced, {}, 18)
    assert (model.opset, model.proto.opset_import[0].version) == (18, 18)
    normed = trace(nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)).eval(), torch.randn(2, 5))
    with pytest.raises(ConfigError, match=r"opset 7.* needs opset 18"):
        to_onnx(normed, {}, 7)


def test_a_network_beyond_what_a_file_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.deploy.onnx.LARGEST_FILE", 1000)
    with pytest.raises(ModelError, match=r"an ONNX file can hold 1,000.*--to pt2"):
        to_onnx(_plain()[1], {})


@pytest.mark.parametrize("name", ["first.weight", "second.bias", "head.weight"])
def test_the_first_value_that_parts_is_found(name: str) -> None:
    network, traced, model = _plain()
    inputs = torch.randn(3, 1, 8, 8)
    assert first_parting(model, inputs, traced.inputs, 1e-5) == ""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    wrong = OnnxModel(proto, model.opset, model.program)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    # The norm is folded into the first layer, whose weight therefore has another name.
    of_first = next(node for node in proto.graph.node if node.op_type == "Conv").input[1]
    tensor = stored[of_first if name == "first.weight" else name]
    values = numpy_helper.to_array(tensor).copy()
    values[0] += 1.0
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    users = [node for node in proto.graph.node if tensor.name in node.input]
    found = first_parting(wrong, inputs, traced.inputs, 1e-5)
    if name == "head.weight":  # its node computes the output itself, whose name is the file's
        assert found == ""
        assert _difference(network(inputs), _loaded(wrong, traced, network)(inputs)) > 1e-5
    else:
        assert found == f"{users[0].output[0]} (Conv)"


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 7, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(14, 2, batch_first=True)
        self.head = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x[:, -1])


def test_recurrent_layers_and_attention_compute_the_same() -> None:
    torch.manual_seed(0)
    network = Recurrent().eval()
    traced = trace(network, torch.randn(2, 6, 5))
    exported = _loaded(to_onnx(traced, {}), traced, network)
    for count in (1, 4):
        inputs = torch.randn(count, 6, 5)
        with torch.no_grad():
            assert _difference(network(inputs), exported(inputs)) < 1e-5


def test_differences_are_relative_and_see_what_is_not_finite() -> None:
    one = torch.tensor([[1.0, -4.0], [0.0, 2.0]])
    difference = Difference()
    difference.add(one, one + torch.tensor([[0.0, 0.2], [0.1, 0.0]]))
    assert difference.largest == pytest.approx(0.2 / 4)
    assert difference.mean == pytest.approx(0.3 / 7)
    nan, inf = torch.tensor([float("nan")]), torch.tensor([float("inf")])
    assert _difference(inf, inf) == _difference(nan, nan) == 0.0
    for pair in ((one[0, :1], nan), (nan, one[0, :1]), (inf, -inf), (one[0, :1], inf)):
        assert _difference(*pair) == float("inf")
    assert _difference(torch.zeros(2), torch.zeros(2)) == 0.0
    assert _difference(torch.zeros(2), torch.tensor([0.0, 1e-9])) == float("inf")
    assert _difference(torch.empty(0), torch.empty(0)) == 0.0
