"""`Hypernet`: its formula, exact starts, and the flows that the original documents."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import vmap

from compress.modules.hypernet import (
    ExternalParameter,
    HyperModule,
    HyperNet,
    Hypernet,
    encode,
    find_modules_of_type,
    hypernetize,
)
from compress.vision.torchvision import torchvision_model

SHAPES = {"b.weight": (4, 3), "a.bias": (4,), "c": ()}


def small(**options: Any) -> Hypernet:
    torch.manual_seed(0)
    return Hypernet({"h": (5,), "g": (2, 1)}, SHAPES, [8], dtype=torch.float64, **options)


def inputs(*batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.rand(*batch, *s, generator=generator, dtype=torch.float64)  # noqa: E731
    return {"h": draw(5), "g": draw(2, 1)}


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    z=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    encoding=st.sampled_from([None, "cos|sin", "z|1-z"]),
)
def test_encodings_follow_their_formula(z: list[float], encoding: Any) -> None:
    encoded = encode(torch.tensor(z, dtype=torch.float64), encoding).tolist()
    expected = {
        None: z,
        "cos|sin": [math.cos(math.pi * v / 2) for v in z] + [math.sin(math.pi * v / 2) for v in z],
        "z|1-z": z + [1 - v for v in z],
    }[encoding]
    assert encoded == pytest.approx(expected, abs=1e-12)
    if encoding == "cos|sin":
        assert sum(v * v for v in encoded) == pytest.approx(len(z))


@pytest.mark.parametrize("encoding", ["cos|sin", "z|1-z"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_inputs_outside_the_unit_interval_warn(encoding: Any, value: float) -> None:
    z = torch.tensor([0.5, value])
    with pytest.warns(UserWarning, match=r"takes inputs in \[0, 1\]"):
        encode(z, encoding)
    encode(z, None)
    assert vmap(lambda row: encode(row, encoding))(z[None]).shape == (1, 4)
    assert encode(z.to("meta"), encoding).shape == (4,)


def test_the_formula() -> None:
    """θ₀ + h(E(γ)), written out with the inputs and outputs in the order of their names."""
    net = small()
    given_inputs = inputs(3)
    flat = torch.cat([given_inputs["g"].reshape(3, 2), given_inputs["h"]], 1)
    encoded = torch.cat([torch.cos(math.pi * flat / 2), torch.sin(math.pi * flat / 2)], 1)
    hidden = F.leaky_relu(encoded @ net.hidden[0].weight.T + net.hidden[0].bias)
    moved = hidden @ net.output.weight.T
    outputs = net(**given_inputs)
    assert list(outputs) == ["a.bias", "b.weight", "c"]
    fixed = net.independent_weights()
    torch.testing.assert_close(outputs["a.bias"], fixed["a.bias"] + moved[:, :4])
    torch.testing.assert_close(
        outputs["b.weight"], fixed["b.weight"] + moved[:, 4:16].reshape(3, 4, 3)
    )
    torch.testing.assert_close(outputs["c"], fixed["c"] + moved[:, 16])
    one = net({k: v[0] for k, v in given_inputs.items()})
    first = net({k: v[:1] for k, v in given_inputs.items()})
    for name, shape in SHAPES.items():
        assert one[name].shape == first[name].shape == shape
        torch.testing.assert_close(one[name], outputs[name][0])
        assert torch.equal(one[name], first[name])


def test_the_order_of_dicts_does_not_matter() -> None:
    net = small()
    torch.manual_seed(0)
    turned = Hypernet(
        {"g": (2, 1), "h": (5,)}, dict(reversed(SHAPES.items())), layer_sizes=[8],
        dtype=torch.float64,
    )  # fmt: skip
    given_inputs = inputs(2)
    one, other = net(given_inputs), turned(dict(reversed(given_inputs.items())))
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name])
    turned.load_state_dict(net.state_dict(), strict=True)


def test_initial_independent_weights() -> None:
    torch.manual_seed(0)
    shapes = {"conv.weight": (64, 32, 3, 3), "conv.bias": (64,), "bn.weight": (64,),
              "bn.bias": (64,), "film.gamma": (4, 1, 1), "film.beta": (4, 1, 1)}  # fmt: skip
    fixed = Hypernet({"h": (1,)}, shapes, [2]).independent_weights()
    for name in ("bn.weight", "film.gamma"):
        assert torch.equal(fixed[name], torch.ones(shapes[name]))
    for name in ("conv.bias", "bn.bias", "film.beta"):
        assert not fixed[name].any()
    gain = nn.init.calculate_gain("leaky_relu")
    assert fixed["conv.weight"].std().item() == pytest.approx(gain / (32 * 9) ** 0.5, rel=0.02)


@pytest.mark.parametrize("encoding", [None, "cos|sin", "z|1-z"])
def test_from_existing_is_exact_and_learns(encoding: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).half())
    hyper, values = hypernetize(model, parameters="all", return_values=True)
    net = Hypernet.from_existing(
        values, {"h": (2,)}, [4], encoding, output_shapes=hyper.external_shapes()
    )
    for batch in ((), (3,)):
        outputs = net(h=torch.rand(*batch, 2))
        for name, value in values.items():
            assert outputs[name].dtype == value.dtype
            assert torch.equal(outputs[name], value.expand_as(outputs[name]))
    loss = sum(v.double().square().sum() for v in net(h=torch.rand(2)).values())
    assert isinstance(loss, Tensor)
    loss.backward()
    assert net.output.weight.grad.abs().max() > 0
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    moved = net(h=torch.tensor([0.1, 0.9]))["0.weight"] - net(h=torch.zeros(2))["0.weight"]
    assert moved.abs().max() > 0
    double = {n: v.double() for n, v in values.items()}
    assert Hypernet.from_existing(double, {"h": (2,)}, [4])(h=torch.rand(2).double())[
        "0.bias"
    ].equal(double["0.bias"])


def test_freezing_and_setting_the_independent_weights() -> None:
    net = small()
    assert net.freeze_independent_weights() is net
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    before = {n: v.clone() for n, v in net.independent_weights().items()}
    sum(v.sum() for v in net(inputs()).values()).backward()  # type: ignore[union-attr]
    optimiser.step()
    assert all(torch.equal(v, before[n]) for n, v in net.independent_weights().items())
    net.freeze_independent_weights(False)
    assert all(p.requires_grad for p in net.parameters())
    new = {n: torch.rand(s, dtype=torch.float64) for n, s in SHAPES.items()}
    net.set_independent_weights(new)
    assert all(torch.equal(v, new[n]) for n, v in net.independent_weights().items())
    for bad, words in (
        ({**new, "c": torch.zeros(2)}, r"'c' has shape \(\); it got \(2,\)"),
        ({**new, "d": torch.zeros(2)}, "unexpected outputs: d"),
        ({}, r"missing outputs: a.bias, b.weight, c"),
    ):
        with pytest.raises(ValueError, match=words):
            net.set_independent_weights(bad)
    assert all(torch.equal(v, new[n]) for n, v in net.independent_weights().items())


def test_round_trips() -> None:
    net = small()
    wanted = net(inputs(2))
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = small(nonlinearity=nn.LeakyReLU)
    for p in fresh.parameters():
        nn.init.zeros_(p)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), fresh):
        for name, value in other(inputs(2)).items():
            assert torch.equal(value, wanted[name])
    single = copy.deepcopy(net).float()
    assert {v.dtype for v in single({k: v.float() for k, v in inputs().items()}).values()} == {
        torch.float32
    }
    on_meta = copy.deepcopy(net).to("meta")
    assert on_meta({k: v.to("meta") for k, v in inputs(2).items()})["c"].shape == (2,)
    assert "17 values" in repr(net)
    assert HyperNet is Hypernet


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"encoding": "sin"}, "encoding='sin' is unknown"),
        ({"input_shapes": {}}, "empty input_shapes"),
        ({"output_shapes": {}}, "empty output_shapes"),
        ({"hidden_sizes": None}, "it got neither"),
        ({"layer_sizes": [3]}, "it got both"),
        ({"hidden_sizes": [3, 0]}, r"\[3, 0\]"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Hypernet(
            **{"input_shapes": {"h": (2,)}, "output_shapes": SHAPES, "hidden_sizes": [3], **options}
        )


def test_bad_inputs() -> None:
    net = small()
    good = inputs(2)
    for bad, words in (
        ({"h": good["h"]}, "missing inputs: g"),
        ({**good, "x": good["h"]}, "unexpected inputs: x"),
        ({**good, "h": torch.zeros(2, 4)}, r"'h' has shape \(5,\) or \('B', 5\); it got \(2, 4\)"),
        ({**good, "h": torch.zeros(3, 5)}, r"different batch sizes: \{'g': 2, 'h': 3\}"),
    ):
        with pytest.raises(ValueError, match=words):
            net(bad)
    values = {"w": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"'w' has shape \(2,\) in the values and \(3,\)"):
        Hypernet.from_existing(values, {"h": (1,)}, [1], output_shapes={"w": (3,)})


class HyperResNet18(nn.Module):
    """Both networks in one module, from the weights of an existing one."""

    def __init__(self) -> None:
        super().__init__()
        mainnet = torchvision_model("resnet18")
        modules = find_modules_of_type(mainnet, [nn.Conv2d])
        self.mainnet, weights = hypernetize(mainnet, modules=modules, return_values=True)
        self.hypernet = Hypernet.from_existing(
            weights, input_shapes={"h": (10,)}, layer_sizes=[2],
            output_shapes=self.mainnet.external_shapes(),
        )  # fmt: skip

    def forward(self, x: Tensor, hyper_input: Tensor) -> Tensor:
        parameters = self.hypernet(h=hyper_input)
        with self.mainnet.using_externals(parameters):
            prediction: Tensor = self.mainnet(x)
        return prediction


def test_all_convolutions_of_resnet18() -> None:
    """The original's first flow: a hypernetwork from scratch for every convolution."""
    torch.manual_seed(0)
    mainnet = torchvision_model("resnet18")
    mainnet = hypernetize(mainnet, modules=find_modules_of_type(mainnet, [nn.Conv2d]))
    shapes = mainnet.external_shapes()
    assert len(shapes) == 20
    assert shapes["layer1.0.conv1.weight"] == (64, 64, 3, 3)
    hypernet = Hypernet(input_shapes={"h": (10,)}, output_shapes=shapes, hidden_sizes=[2])
    parameters = hypernet(h=torch.rand(10))
    with mainnet.using_externals(parameters):
        prediction = mainnet(torch.randn(2, 3, 32, 32))
    assert prediction.shape == (2, 1000)
    assert prediction.isfinite().all()
    assert not any(slot.is_set for slot in mainnet.externals())
    prediction.square().mean().backward()
    assert hypernet.output.weight.grad.abs().max() > 0


def test_both_networks_in_one_module_from_pretrained_weights() -> None:
    torch.manual_seed(0)
    plain = torchvision_model("resnet18").eval()
    torch.manual_seed(0)
    model = HyperResNet18().eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x, torch.rand(10)), plain(x))
    names = dict(model.named_parameters())
    assert "mainnet.bn1.weight" in names
    assert "mainnet.conv1.weight" not in names


def test_a_hypernetwork_of_a_hypernetwork() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    mainnet, weights = hypernetize(model, parameters="all", return_values=True)
    inner = Hypernet.from_existing(weights, {"h": (2,)}, [3])
    inner, inner_weights = hypernetize(inner, parameters="all", return_values=True)
    assert not list(inner.parameters())
    outer = Hypernet.from_existing(inner_weights, {"z": (1,)}, [2])
    x = torch.randn(5, 3)

    def run() -> Tensor:
        with inner.using_externals(outer(z=torch.rand(1))):
            values = inner(h=torch.rand(2))
        with mainnet.using_externals(values):
            return mainnet(x)

    with mainnet.using_externals(weights):
        torch.testing.assert_close(run(), mainnet(x), rtol=0, atol=0)
    run().square().sum().backward()
    assert outer.output.weight.grad.abs().max() > 0
    again = pickle.loads(pickle.dumps(inner))
    assert list(again.external_shapes()) == list(inner.external_shapes())


class FiLM(HyperModule):
    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.gamma = ExternalParameter((n_features, 1, 1))
        self.beta = ExternalParameter((n_features, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x + self.beta


class CNNwithFiLM(HyperModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), FiLM(8), nn.LeakyReLU(), nn.BatchNorm2d(8),
            nn.Conv2d(8, 16, 3, padding=1), FiLM(16), nn.AdaptiveAvgPool2d((1, 1)),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_film() -> None:
    main = CNNwithFiLM()
    aux = Hypernet({"film_input": (4,)}, main.external_shapes(), hidden_sizes=[])
    assert list(main.external_shapes()) == [
        "layers.1.gamma", "layers.1.beta", "layers.5.gamma", "layers.5.beta",
    ]  # fmt: skip
    with main.using_externals(aux(film_input=torch.rand(4))):
        output = main(torch.randn(2, 3, 6, 6))
    assert output.shape == (2, 16, 1, 1)
    output.sum().backward()
    assert aux.output.weight.grad.abs().max() > 0


def test_one_network_a_sample_by_vmap() -> None:
    torch.manual_seed(0)
    mainnet = hypernetize(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), parameters="all"
    )
    hypernet = Hypernet({"h": (2,)}, mainnet.external_shapes(), [4])
    h, x = torch.rand(5, 2), torch.randn(5, 3)

    def run(values: dict[str, Tensor], row: Tensor) -> Tensor:
        with mainnet.using_externals(values):
            return mainnet(row)

    together = vmap(run)(hypernet(h=h), x)
    inside = vmap(lambda one, row: run(hypernet(h=one), row))(h, x)
    for index in range(5):
        expected = run(hypernet(h=h[index]), x[index])
        torch.testing.assert_close(together[index], expected)
        torch.testing.assert_close(inside[index], expected)
