"""Programs written for HyperLight: its examples, its names, its state dicts, and what differs.

The examples keep HyperLight's names, and only the import is changed.
"""

from __future__ import annotations

import gc
import math
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compress.modules.hypernet as hl

PAGE = Path(__file__).resolve().parents[2] / "docs" / "from-hyperlight.md"


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, 1)
        self.conv2 = nn.Conv2d(16, 32, 3, 1)
        self.conv3 = nn.Conv2d(32, 64, 3, 1)
        self.conv4 = nn.Conv2d(64, 64, 3, 1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x))))
        x = F.max_pool2d(x, 2, 2)
        x = F.max_pool2d(F.leaky_relu(self.conv3(x)), 2, 2)
        x = F.adaptive_avg_pool2d(F.leaky_relu(self.conv4(x)), (1, 1))
        return self.fc(x.reshape(-1, self.fc.in_features))


@pytest.mark.parametrize(
    "code", re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S), ids=lambda _: "example"
)
def test_the_page(code: str) -> None:
    assert "assert" in code
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_getting_started() -> None:
    mainnet = ConvNet()
    module_to_hypernetize = [mainnet.conv1, mainnet.conv2, mainnet.conv3, mainnet.conv4]
    mainnet = hl.hypernetize(mainnet, modules=module_to_hypernetize)
    parameter_shapes = mainnet.external_shapes()
    hypernet = hl.HyperNet(
        input_shapes={"h": (10,)}, output_shapes=parameter_shapes, hidden_sizes=[16, 64, 128]
    )
    h = torch.zeros((10,))
    x = torch.zeros((1, 1, 28, 28))
    parameters = hypernet(h=h)
    with mainnet.using_externals(parameters):
        prediction = mainnet(x)
    assert prediction.shape == (1, 10)
    with pytest.raises(AttributeError):
        mainnet(x)

    class HyperConvNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mainnet = ConvNet()
            modules = hl.find_modules_of_type(mainnet, [nn.Conv2d])
            self.mainnet = hl.hypernetize(mainnet, modules=modules)
            self.hypernet = hl.HyperNet(
                input_shapes={"h": (10,)},
                output_shapes=parameter_shapes,
                hidden_sizes=[16, 64, 128],
            )

        def forward(self, main_input: Tensor, hyper_input: Tensor) -> Tensor:
            parameters = self.hypernet(h=hyper_input)
            with self.mainnet.using_externals(parameters):
                prediction: Tensor = self.mainnet(main_input)
            return prediction

    model = HyperConvNet()
    assert model(x, h).shape == (1, 10)


def test_a_hyper_module_by_hand() -> None:
    class HyperLinear(hl.HyperModule):
        in_features: int
        out_features: int

        def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
            super().__init__()
            assert isinstance(in_features, int)
            self.in_features = in_features
            self.out_features = out_features
            self.weight = hl.ExternalParameter(shape=(out_features, in_features))
            if bias:
                self.bias = hl.ExternalParameter(shape=(out_features,))
            else:
                self.bias = None

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return F.linear(input, self.weight, self.bias)

    layer = HyperLinear(in_features=8, out_features=16)
    assert layer.external_shapes() == {"weight": (16, 8), "bias": (16,)}
    x = torch.zeros(1, 8)
    layer.set_externals(weight=torch.rand(size=(16, 8)), bias=torch.zeros((16,)))
    assert layer(x).shape == (1, 16)
    layer.reset_externals()
    params = {"weight": torch.rand(size=(16, 8)), "bias": torch.zeros((16,))}
    with layer.using_externals(params):
        assert layer(x).shape == (1, 16)


def test_static_and_dynamic_modules_have_the_same_slots() -> None:
    class PrimaryConvNet(hl.HyperModule):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = hl.HyperConv2d(1, 16, 5, 1)
            self.conv2 = hl.HyperConv2d(16, 32, 3, 1)
            self.conv3 = nn.Conv2d(32, 64, 3, 1)
            self.conv4 = nn.Conv2d(64, 64, 3, 1)
            self.fc = nn.Linear(64, 10)

        forward = ConvNet.forward

    primary = PrimaryConvNet()
    shapes = {
        "conv1.bias": (16,), "conv1.weight": (16, 1, 5, 5),
        "conv2.bias": (32,), "conv2.weight": (32, 16, 3, 3),
    }  # fmt: skip
    assert primary.external_shapes() == shapes
    values = {name: torch.rand(shape) for name, shape in shapes.items()}
    with primary.using_externals(values):
        assert primary(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    layer = nn.Linear(in_features=8, out_features=16)
    layer = hl.hypernetize(layer, parameters=[layer.weight, layer.bias])
    assert "HypernetizedLinear" in repr(layer)
    assert layer.external_shapes() == {"weight": (16, 8), "bias": (16,)}
    model = ConvNet()
    model = hl.hypernetize(model, modules=[model.conv1, model.conv2])
    assert model.external_shapes() == shapes


def test_finding_modules_and_parameters() -> None:
    model = ConvNet()
    convs = {"conv1", "conv2", "conv3", "conv4"}
    assert set(hl.find_modules_of_type(model, [nn.Conv2d])) == convs
    found = hl.find_modules_from_patterns(model, regex=["conv[1-3]"])
    assert set(found) == convs - {"conv4"}
    weights = hl.find_parameters_from_patterns(model, globs=["conv*.weight"]).keys()
    assert set(weights) == {f"{name}.weight" for name in convs}


def test_film() -> None:
    class FiLM(hl.HyperModule):
        def __init__(self, n_features: int, dims: int = 2) -> None:
            super().__init__()
            self.n_features = n_features
            self.dims = dims
            extra_dims = [1 for _ in range(dims)]
            self.gamma = hl.ExternalParameter((n_features, *extra_dims))
            self.beta = hl.ExternalParameter((n_features, *extra_dims))

        def forward(self, x: Tensor) -> Tensor:
            return self.gamma * x + self.beta

    class FiLM_ConvNet(hl.HyperModule):  # noqa: N801
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(1, 16, 5, 1)
            self.film1 = FiLM(16)
            self.conv2 = nn.Conv2d(16, 32, 3, 1)
            self.film2 = FiLM(32)
            self.fc = nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.film1(F.leaky_relu(self.conv1(x)))
            x = self.film2(F.leaky_relu(self.conv2(x)))
            return self.fc(x.mean((2, 3)))

    class FiLM_Model(nn.Module):  # noqa: N801
        def __init__(self, embedding_size: int) -> None:
            super().__init__()
            self.main = FiLM_ConvNet()
            self.cond = hl.HyperNet(
                input_shapes={"film_input": (embedding_size,)},
                output_shapes=self.main.external_shapes(),
                hidden_sizes=[],
            )

        def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
            params = self.cond(film_input=conditioning)
            with self.main.using_externals(params):
                return self.main(x)

    model = FiLM_Model(7)
    assert model(torch.randn((1, 1, 28, 28)), torch.rand(1, 7)).shape == (1, 10)


def test_slots_take_data_before_dtype() -> None:
    value = torch.rand(2, 3)
    slot = hl.ExternalParameter((2, 3), value, torch.float32)
    assert slot.data is value
    assert slot.dtype == torch.float32
    assert hl.ExternalParameter([2, 3], data=value).is_set
    with pytest.raises(ValueError, match=r"has shape \(3, 2\)"):
        hl.ExternalParameter((3, 2), value)
    with pytest.raises(TypeError, match=r"data before dtype; write dtype=torch\.float32"):
        hl.ExternalParameter((2, 3), torch.float32)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, not a Tensor"):
        hl.ExternalParameter((2, 3), dtype=value)  # type: ignore[arg-type]


def test_other_names_of_hyper_modules() -> None:
    model = hl.hypernetize(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), parameters="all")
    weight, bias = torch.rand(3, 2), torch.rand(1)
    model[0].set_external("weight", weight)
    model.apply_externals({"1.bias": bias})
    assert model[0].weight is weight
    assert model[1].bias is bias
    other = torch.rand(3, 2)
    model.apply_externals({model[0]: {"weight": other}})
    assert model[0].weight is other
    with pytest.raises(ValueError, match="This Linear is not a module of the Hypernetized"):
        model.apply_externals({nn.Linear(2, 2): {"weight": other}})  # type: ignore[dict-item]

    class Scale(hl.HyperModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    module = Scale()
    assert torch.equal(module.convert_external("scale"), torch.ones(2))
    assert module.external_shapes() == {"scale": (2,)}
    layer = nn.Linear(2, 3)
    single, values = hl.hypernetize_single(layer, [layer.bias], return_parameters=True)  # type: ignore[misc]
    assert list(single.external_shapes()) == list(values) == ["bias"]
    with pytest.raises(
        ValueError, match=r"Parameter of shape \(3, 2\) is not a parameter of the Li"
    ):
        hl.hypernetize_single(nn.Linear(2, 3), [layer.weight])


def test_a_container_is_taken_with_a_warning_or_by_name_without() -> None:
    body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = nn.ModuleDict({"body": body, "head": nn.Linear(2, 1)})
    taken = [f"body.{i}.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")]
    with pytest.warns(UserWarning, match=r"Sequential has 4 parameters in its submodules .*dotted"):
        hyper = hl.hypernetize(model, modules=[body])
    assert list(hyper.external_shapes()) == taken
    for modules in (["body"], [body, *body], {"": body, "0": body[0], "1": body[1]}, iter([*body])):
        assert list(hl.hypernetize(model, modules=modules).external_shapes()) == taken
    attention = nn.MultiheadAttention(4, 2)
    with pytest.warns(UserWarning, match=r"2 parameters in its submodules \(out_proj.weight"):
        hl.hypernetize(nn.Sequential(attention), modules=[attention])
    hl.hypernetize(nn.Sequential(attention), modules=[attention, attention.out_proj])
    hl.hypernetize(nn.Sequential(nn.Sequential(nn.ReLU())), modules=[])


def test_taking_everything_without_saying_so_gives_a_warning() -> None:
    model = nn.Sequential(hl.HyperLinear(2, 3), nn.Linear(3, 1))
    with pytest.warns(UserWarning, match=r"takes all 2 parameters of the Sequential, where Hyper"):
        assert len(hl.hypernetize(model).external_shapes()) == 4
    model = nn.Sequential(hl.HyperLinear(2, 3), nn.Linear(3, 1))
    assert len(hl.hypernetize(model, parameters="all").external_shapes()) == 4
    model = nn.Sequential(hl.HyperLinear(2, 3), nn.Linear(3, 1))
    assert list(hl.hypernetize(model, modules=[]).external_shapes()) == ["0.weight", "0.bias"]
    with pytest.warns(
        UserWarning, match=r"takes all 2 of the Linear's own, where HyperLight takes"
    ):
        single = hl.hypernetize_single(nn.Linear(2, 3))
    assert isinstance(single, hl.HyperModule)
    assert list(single.external_shapes()) == ["weight", "bias"]


def test_a_parameter_called_all_is_taken_by_its_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = nn.Parameter(torch.zeros(2))
            self.other = nn.Parameter(torch.zeros(3))

    assert list(hl.hypernetize(Named(), parameters=["all"]).external_shapes()) == ["all"]
    assert list(hl.hypernetize(Named(), parameters="all").external_shapes()) == ["all", "other"]


def test_flags_are_no_positional_arguments() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="positional"):
        hl.hypernetize(model, None, None, True)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="positional"):
        hl.hypernetize_single(model, None, True)  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        hl.Hypernet({"h": (1,)}, {"w": (1,)}, [1], None, True)  # type: ignore[misc]


def test_optimisers_that_would_train_nothing_are_pointed_out() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimiser = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hl.hypernetize(model, modules=["0"], inplace=False)
        other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
        # In place the optimiser goes on to train what is left.
        hyper, values = hl.hypernetize(model, modules=["0"], return_values=True)
        before = model[1].bias.detach().clone()
        with hyper.using_externals(values):
            hyper(torch.ones(1, 2)).sum().backward()
        optimiser.step()
        assert not torch.equal(model[1].bias, before)
    with pytest.warns(UserWarning, match="SGD holds 1 parameters that become external"):
        hl.hypernetize(model, parameters=["1.bias"])
    del other, optimiser
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hl.hypernetize(model, parameters=["1.weight"])


class Backbone(nn.Module):
    """HyperLight's network, re-stated with the names of its state dict."""

    def __init__(self, inputs: int, shapes: dict[str, Any], hidden: list[int]) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        size = 2 * inputs
        for index, width in enumerate(hidden):
            layers[f"block{index}_lin"] = nn.Linear(size, width)
            layers[f"block{index}_act"] = nn.LeakyReLU()
            layers[f"block{index}_drop"] = nn.Dropout(0.5)
            size = width
        layers["output"] = nn.Linear(size, sum(math.prod(s) for s in shapes.values()))
        self.backbone = nn.Sequential(layers)
        self.shapes = shapes

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        flat = torch.cat([inputs[n].reshape(len(inputs[n]), -1) for n in sorted(inputs)], dim=-1)
        flat = torch.cat([torch.cos(math.pi * flat / 2), torch.sin(math.pi * flat / 2)], dim=-1)
        emitted, outputs, start = self.backbone(flat), {}, 0
        for name, shape in self.shapes.items():
            size = math.prod(shape)
            outputs[name] = emitted[:, start : start + size].reshape(-1, *shape)
            start += size
        return outputs


@pytest.mark.parametrize("hidden", [[], [5], [5, 4]])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_state_dicts_in_both_directions(hidden: list[int], dropout: float) -> None:
    torch.manual_seed(0)
    shapes = {"z.weight": (2, 3), "c": (), "a.bias": (4,)}  # not in the order of their names
    original = Backbone(3, shapes, hidden).eval()
    new = hl.HyperNet(
        {"h": (2,), "g": (1, 1)}, shapes, hidden, fc_kws={"dropout_prob": dropout}
    ).eval()
    state = hl.state_dict_from_hyperlight(new, original.state_dict(), shapes)
    new.load_state_dict(state, strict=True)
    inputs = {"h": torch.rand(6, 2), "g": torch.rand(6, 1, 1)}
    expected, got = original(**inputs), new(**inputs)
    for name in shapes:
        torch.testing.assert_close(got[name], expected[name])
    back = hl.state_dict_to_hyperlight(new, shapes)
    assert list(back) == list(original.state_dict())
    for name, value in original.state_dict().items():
        assert torch.equal(back[name], value)
    assert not any(value.requires_grad for value in (*back.values(), *state.values()))
    turned = dict(sorted(shapes.items()))
    assert not torch.equal(
        hl.state_dict_from_hyperlight(new, original.state_dict(), turned)["output.weight"],
        state["output.weight"],
    )


def test_state_dicts_that_do_not_fit() -> None:
    shapes = {"w": (2, 3), "b": (2,)}
    original = Backbone(2, shapes, [5]).state_dict()
    new = hl.HyperNet({"h": (2,)}, shapes, [5])
    with pytest.raises(ValueError, match=r"they differ in b\.$"):
        hl.state_dict_from_hyperlight(new, original, {"w": (2, 3), "b": (3,)})
    with pytest.raises(ValueError, match=r"they differ in b, x\.$"):
        hl.state_dict_to_hyperlight(new, {"w": (2, 3), "x": (2,)})
    extra = {**original, "more": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"missing \[\], unexpected \['more'\]"):
        hl.state_dict_from_hyperlight(new, extra, shapes)
    wide = hl.HyperNet({"h": (2,)}, shapes, [6])
    with pytest.raises(ValueError, match=r"block0_lin.weight has shape \(5, 4\); .* \(6, 4\)"):
        hl.state_dict_from_hyperlight(wide, original, shapes)
    normed = hl.HyperNet({"h": (2,)}, shapes, [5], norm=nn.LayerNorm)
    with pytest.raises(ValueError, match="normalisation layers"):
        hl.state_dict_to_hyperlight(normed, shapes)
