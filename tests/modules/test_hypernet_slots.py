"""Slots, the modules that hold them, the Hyper layers and `hypernetize`."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from module_trees import sample, trees
from torch import Tensor, nn
from torch.func import functional_call, vmap

from compress.modules.hypernet import (
    ExternalParameter,
    HyperConv1d,
    HyperConv2d,
    HyperConv3d,
    HyperLinear,
    HyperModule,
    find_modules_from_patterns,
    find_modules_of_type,
    find_parameters_from_patterns,
    hypernetize,
    hypernetize_single,
)
from compress.vision.torchvision import torchvision_model


class Plain(nn.Module):
    """Importable, for pickles."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def externals_of(model: HyperModule) -> dict[str, Tensor | None]:
    return {name: slot._value for name, slot in model.named_externals()}


def test_a_slot_checks_what_it_takes() -> None:
    slot = ExternalParameter((2, 3), dtype=torch.float32)
    slot.name = "body.weight"
    with pytest.raises(AttributeError, match=r"'body.weight' of shape \(2, 3\) is not set"):
        _ = slot.data
    with pytest.raises(ValueError, match=r"'body.weight' has shape \(2, 3\); .* \(3, 2\)"):
        slot.data = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"'body.weight' is of torch.float32; .* torch.float64"):
        slot.data = torch.zeros(2, 3).double()
    with pytest.raises(TypeError, match="takes a tensor, not a list"):
        slot.data = [0]  # type: ignore[assignment]
    value = torch.zeros(2, 3)
    slot.data = value
    assert slot.data is value
    assert slot.is_set
    assert repr(slot) == "ExternalParameter(shape=(2, 3), dtype=torch.float32, set)"
    slot.reset()
    assert not slot.is_set
    free = ExternalParameter((2,))
    free.data = torch.zeros(2, dtype=torch.int64)


def test_the_hand_written_layer_of_the_original() -> None:
    class Mine(HyperModule):
        def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
            super().__init__()
            self.weight = ExternalParameter(shape=(out_features, in_features))
            self.bias = ExternalParameter(shape=(out_features,)) if bias else None

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    layer = Mine(8, 16)
    assert layer.external_shapes() == {"weight": (16, 8), "bias": (16,)}
    x = torch.randn(1, 8)
    with pytest.raises(AttributeError, match=r"'Mine.weight'"):
        layer(x)
    assert not hasattr(layer, "weight")
    weight, bias = torch.rand(16, 8), torch.zeros(16)
    layer.set_externals(weight=weight, bias=bias)
    assert torch.equal(layer(x), F.linear(x, weight, bias))
    layer.reset_externals()
    assert externals_of(layer) == {"weight": None, "bias": None}
    with layer.using_externals({"weight": weight, "bias": bias}):
        assert torch.equal(layer(x), F.linear(x, weight, bias))
    assert externals_of(layer) == {"weight": None, "bias": None}
    assert Mine(2, 3, bias=False).external_shapes() == {"weight": (3, 2)}
    layer.weight = weight
    assert layer.get_external("weight").data is weight
    del layer.bias
    assert layer.external_shapes() == {"weight": (16, 8)}
    layer.weight = None
    assert layer.external_shapes() == {}


def test_slots_that_cannot_be_registered() -> None:
    layer = HyperLinear(2, 3)
    with pytest.raises(KeyError, match="attribute 'training'"):
        layer.register_external("training", ExternalParameter((1,)))
    with pytest.raises(KeyError, match="has a dot"):
        layer.register_external("a.b", ExternalParameter((1,)))
    with pytest.raises(TypeError, match="not a Tensor"):
        layer.register_external("scale", torch.zeros(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not 3"):
        layer.register_external(3, ExternalParameter((1,)))  # type: ignore[arg-type]

    class Early(HyperModule):
        def __init__(self) -> None:
            self.weight = ExternalParameter((1,))

    with pytest.raises(AttributeError, match=r"before HyperModule.__init__"):
        Early()


def test_contexts_restore_and_nest() -> None:
    model = hypernetize(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), parameters="all")
    first = {n: torch.rand(s) for n, s in model.external_shapes().items()}
    second = {"1.weight": torch.rand(1, 3)}
    x = torch.rand(1, 2)
    with model.using_externals(first):
        outer = model(x)
        with model.using_externals(second):
            assert model[1].weight is second["1.weight"]
            assert model[0].weight is first["0.weight"]
            assert not torch.equal(model(x), outer)
            with pytest.raises(RuntimeError, match="inside"):
                with model.using_externals({"0.bias": torch.ones(3)}):
                    raise RuntimeError("inside")
            assert model[0].bias is first["0.bias"]
        assert torch.equal(model(x), outer)
    assert not any(slot.is_set for slot in model.externals())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        with model.using_externals(first):
            model(torch.rand(1, 5))
    assert not any(slot.is_set for slot in model.externals())
    model.set_externals(first)
    with model.using_externals(second):
        pass
    assert externals_of(model) == first


def test_a_context_checks_everything_before_it_starts() -> None:
    model = hypernetize(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), parameters="all")
    good = {n: torch.rand(s) for n, s in model.external_shapes().items()}
    for bad, words in (
        ({**good, "1.wieght": good["1.weight"]}, r"no external .*'1.wieght'.*Did you mean '1.we"),
        ({k: v for k, v in good.items() if k != "1.bias"}, r"no value for 1 .*: 1\.bias"),
        ({**good, "1.bias": torch.zeros(2)}, r"'1.bias' has shape \(1,\)"),
        ({**good, "1.bias": torch.zeros(1).half()}, r"'1.bias' is of torch.float32"),
        ({}, "no value for 4"),
    ):
        with pytest.raises(ValueError, match=words):
            with model.using_externals(bad):
                raise AssertionError("the context started")
        assert not any(slot.is_set for slot in model.externals())
    with pytest.raises(ValueError, match=r"'1.bias' has shape"):
        model.set_externals({**good, "1.bias": torch.zeros(2)})
    assert not any(slot.is_set for slot in model.externals())
    with pytest.raises(ValueError, match="no external parameter 'weigt'"):
        HyperLinear(2, 3).set_externals(weigt=torch.zeros(3, 2))


CONVS: list[Any] = [
    (HyperConv1d, nn.Conv1d, F.conv1d, 1),
    (HyperConv2d, nn.Conv2d, F.conv2d, 2),
    (HyperConv3d, nn.Conv3d, F.conv3d, 3),
]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("which", range(3))
def test_hyper_convolutions(which: int, mode: str) -> None:
    hyper, plain, _, dims = CONVS[which]
    torch.manual_seed(0)
    for options in (
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 2, "stride": 2, "dilation": 2, "groups": 2, "bias": False},
    ):
        layer = hyper(4, 6, padding_mode=mode, **options)
        twin = plain(4, 6, padding_mode=mode, **options)
        x = torch.randn(2, 4, *[7] * dims)
        with layer.using_externals(dict(twin.named_parameters())):
            assert torch.equal(layer(x), twin(x))
        expected = repr(twin).replace("Conv", "HyperConv")[:-1]
        slots = ", ".join(n for n, _ in twin.named_parameters())
        assert repr(layer) == f"{expected}, external=[{slots}])"
        assert list(layer.parameters()) == []
        assert not any(slot.is_set for slot in layer.externals())


def test_hyper_linear() -> None:
    layer = HyperLinear(4, 3)
    twin = nn.Linear(4, 3).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    layer.set_externals(**dict(twin.named_parameters()))
    assert torch.equal(layer(x), twin(x))
    assert "in_features=4, out_features=3, bias=True, external=[weight, bias]" in repr(layer)
    assert HyperLinear(4, 3, bias=False).external_shapes() == {"weight": (3, 4)}
    strict = HyperLinear(4, 3, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"torch.float64"):
        strict.set_externals(**dict(twin.named_parameters()))
    strict.double().set_externals(**dict(twin.named_parameters()))


@settings(derandomize=True, deadline=None, max_examples=8)
@given(trees())
def test_any_tree_is_bit_equal_with_its_values_back(model: nn.Module) -> None:
    x = sample()
    expected = model(x)
    names = list(dict(model.named_parameters()))
    before = {id(m): type(m) for m in model.modules()}
    hyper, values = hypernetize(model, parameters="all", return_values=True, inplace=False)
    assert list(values) == list(hyper.external_shapes()) == names
    assert list(hyper.parameters()) == []
    with hyper.using_externals(values):
        assert torch.equal(hyper(x), expected)
    shifted = {name: value + 0.1 for name, value in values.items()}
    with hyper.using_externals(shifted):
        output = hyper(x)
    torch.testing.assert_close(output, functional_call(copy.deepcopy(model), shifted, (x,)))
    assert {id(m): type(m) for m in model.modules()} == before
    assert torch.equal(model(x), expected)
    twin = copy.deepcopy(hyper)
    twin.load_state_dict(hyper.state_dict())
    twin.set_externals(values)
    assert torch.equal(twin(x), expected)
    assert hypernetize(model, parameters="all", inplace=True) is model
    with model.using_externals(values):  # type: ignore[operator]
        assert torch.equal(model(x), expected)


def test_the_originals_examples_of_dynamic_conversion() -> None:
    layer = nn.Linear(in_features=8, out_features=16)
    single = hypernetize(layer, parameters=[layer.weight, layer.bias])
    assert type(single).__name__ == "HypernetizedLinear"
    assert isinstance(single, nn.Linear)
    assert isinstance(single, HyperModule)
    assert single.external_shapes() == {"weight": (16, 8), "bias": (16,)}
    assert repr(single).startswith("HypernetizedLinear(in_features=8")
    model = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 128, 3), norm=nn.BatchNorm2d(128), relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d((1, 1)), out=nn.Linear(128, 10),
        )
    )  # fmt: skip
    modules = [model.conv, model.out]
    hyper = hypernetize(model, modules=modules, inplace=False)
    assert hyper.external_shapes() == {
        "conv.weight": (128, 3, 3, 3), "conv.bias": (128,),
        "out.weight": (10, 128), "out.bias": (10,),
    }  # fmt: skip
    assert modules == [model.conv, model.out]
    assert type(model.conv) is nn.Conv2d
    assert hypernetize(model, modules=[], inplace=False).external_shapes() == {}
    one = hypernetize(model, parameters=["out.bias"], inplace=False)
    assert list(one.external_shapes()) == ["out.bias"]
    # As in HyperLight, the model itself is converted where nothing else is said.
    found = hypernetize(model, modules=["conv"])
    assert found is model
    assert isinstance(model.conv, HyperModule)
    assert list(found.external_shapes()) == ["conv.weight", "conv.bias"]
    with pytest.warns(UserWarning, match="The chosen HypernetizedSequential has 4 param"):
        assert len(hypernetize(model, modules=[model]).external_shapes()) == 6


def test_single_modules_by_parameter_names() -> None:
    norm = nn.BatchNorm2d(4)
    hyper = hypernetize_single(norm, ["weight"], inplace=False)
    assert isinstance(hyper, HyperModule)
    assert hyper.external_shapes() == {"weight": (4,)}
    assert list(dict(hyper.named_parameters())) == ["bias"]
    _, values = hypernetize_single(  # type: ignore[misc]
        norm, parameters="all", return_values=True, inplace=False
    )
    assert list(values) == ["weight", "bias"]
    assert hypernetize_single(norm, ["bias"]) is norm
    with pytest.raises(ValueError, match=r"no parameter 'wight' of its own. Did you mean 'weight'"):
        hypernetize_single(nn.Linear(2, 2), ["wight"])
    layer = HyperLinear(2, 2)
    with pytest.raises(ValueError, match="no parameter 'weight'"):
        layer.convert_externals(["weight"])


def test_shared_and_tied_keep_one_slot() -> None:
    layer = nn.Linear(3, 3)
    tied = nn.Linear(3, 3)
    tied.weight = layer.weight
    model = nn.ModuleDict({"a": layer, "b": layer, "c": tied})
    hyper = hypernetize(model, modules=[layer])
    assert hyper.external_shapes() == {"a.weight": (3, 3), "a.bias": (3,)}
    assert hyper["a"] is hyper["b"]
    weight, bias = torch.rand(3, 3), torch.rand(3)
    with hyper.using_externals({"b.weight": weight, "a.bias": bias}):
        assert hyper["c"].weight is hyper["a"].weight is weight
        assert hyper["c"].bias is not bias
    with pytest.raises(ValueError, match=r"'a.weight' and 'c.weight' are one external parameter"):
        hyper.set_externals({"a.weight": weight, "c.weight": weight + 1})
    hyper.set_externals({"a.weight": weight, "c.weight": weight})


def test_recurrent_and_attention_layers_follow_their_slots() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 4)
    for make in (
        lambda: nn.LSTM(4, 3, batch_first=True),
        lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
    ):
        model, other = make(), make()
        hyper, values = hypernetize(model, parameters="all", return_values=True, inplace=False)
        for source in (dict(other.named_parameters()), values):
            with hyper.using_externals({n: v.detach() for n, v in source.items()}):
                output = hyper(x)
            wanted = (other if source is not values else model)(x)
            if isinstance(wanted, tuple):
                output, wanted = output[0], wanted[0]
            torch.testing.assert_close(output, wanted)


def test_batch_norm_parameters_as_slots() -> None:
    model = Plain()
    norms = find_modules_of_type(model, nn.BatchNorm2d)
    hyper, values = hypernetize(model, modules=norms, return_values=True)
    assert list(values) == ["norm.weight", "norm.bias"]
    x = torch.randn(4, 3, 5, 5)
    with hyper.using_externals(values):
        assert torch.equal(hyper(x), model(x))
    assert torch.equal(hyper.norm.running_mean, model.norm.running_mean)


def test_round_trips() -> None:
    hyper, values = hypernetize(Plain(), modules=["conv"], return_values=True)
    x = torch.randn(2, 3, 5, 5)
    hyper.eval()
    with hyper.using_externals(values):
        expected = hyper(x)
        within = copy.deepcopy(hyper)
    assert torch.equal(within(x), expected)
    for other in (copy.deepcopy(hyper), pickle.loads(pickle.dumps(hyper))):
        assert type(other) is type(hyper)
        assert not any(slot.is_set for slot in other.externals())
        with other.using_externals(values):
            assert torch.equal(other(x), expected)
        assert not any(slot.is_set for slot in hyper.externals())
    file = io.BytesIO()
    torch.save(hyper.state_dict(), file)
    file.seek(0)
    fresh = hypernetize(Plain(), modules=["conv"]).eval()
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    with fresh.using_externals(values):
        assert torch.equal(fresh(x), expected)
    hyper.set_externals(values)
    hyper.double()
    assert hyper.conv.weight.dtype == torch.float64
    assert hyper.get_external("conv.bias").dtype == torch.float64
    torch.testing.assert_close(hyper(x.double()).float(), expected)
    hyper.to("meta")
    assert hyper(x.double().to("meta")).shape == (2, 2)
    learnt = {n: v.requires_grad_() * 2 for n, v in values.items()}
    with fresh.using_externals(learnt):
        inside = copy.deepcopy(fresh)
        fresh(x).sum().backward()
    assert values["conv.weight"].grad is not None
    assert not inside.conv.weight.requires_grad
    assert "external=[weight, bias]" in repr(fresh)


def test_values_of_a_batch_by_vmap() -> None:
    hyper = hypernetize(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), parameters="all"
    )
    batch = {n: torch.randn(5, *s) for n, s in hyper.external_shapes().items()}
    x = torch.randn(5, 3)

    def run(values: dict[str, Tensor], row: Tensor) -> Tensor:
        with hyper.using_externals(values):
            return hyper(row)

    outputs = vmap(run)(batch, x)
    for index in range(5):
        expected = run({n: v[index] for n, v in batch.items()}, x[index])
        torch.testing.assert_close(outputs[index], expected)
    assert not any(slot.is_set for slot in hyper.externals())


def test_what_cannot_be_hypernetized_is_refused_and_nothing_changes() -> None:
    model = Plain()
    kinds = {n: type(m) for n, m in model.named_modules()}
    names = list(dict(model.named_parameters()))
    for options, words in (
        ({"modules": [nn.Linear(2, 2)]}, "This Linear is not a module of the Plain"),
        ({"modules": ["cnv"]}, "no module 'cnv'. Did you mean 'conv'"),
        ({"modules": [3]}, "This int is not a module"),
        ({"parameters": [torch.zeros(2, 2)]}, r"Tensor of shape \(2, 2\) is not a parameter"),
        ({"parameters": ["out.weigh"]}, "Did you mean 'out.weight'"),
        ({"modules": ["conv"], "parameters": ["x"]}, "no parameter 'x'"),
    ):
        with pytest.raises(ValueError, match=words):
            hypernetize(model, inplace=True, **options)
        assert {n: type(m) for n, m in model.named_modules()} == kinds
        assert list(dict(model.named_parameters())) == names
    with pytest.raises(TypeError, match="not a str"):
        hypernetize("model")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="'weight' of the LazyLinear is lazy"):
        hypernetize(nn.LazyLinear(3))
    scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="compiled code"):
        hypernetize(nn.Sequential(nn.ReLU(), scripted))


def test_finders_on_resnet18() -> None:
    model = torchvision_model("resnet18")
    convs = find_modules_of_type(model, [nn.Conv2d])
    assert isinstance(convs, OrderedDict)
    assert list(convs)[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert len(convs) == 20
    found = find_modules_from_patterns(model, regex=[r"^layer\d.0.conv1"])
    assert list(found) == [f"layer{i}.0.conv1" for i in (1, 2, 3, 4)]
    assert found["layer2.0.conv1"] is model.layer2[0].conv1
    weights = find_parameters_from_patterns(model, globs=["layer1*conv*.weight"])
    assert list(weights) == [f"layer1.{i}.conv{j}.weight" for i in (0, 1) for j in (1, 2)]
    both = find_modules_from_patterns(model, globs="fc", regex="^bn1$")
    assert list(both) == ["bn1", "fc"]
    everything = find_modules_from_patterns(model, globs=["*"])
    assert "" not in everything
    assert list(everything) == [name for name, _ in model.named_modules() if name]
    assert "" not in find_modules_from_patterns(model, regex=[".*"])
    assert find_parameters_from_patterns(model, globs=["nothing"]) == {}
    hyper = hypernetize(model, parameters=weights)
    assert list(hyper.external_shapes()) == list(weights)


def test_finders_see_every_name_of_what_is_shared() -> None:
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": layer, "b": layer})
    assert list(find_modules_from_patterns(model, globs=["b"])) == ["b"]
    assert list(find_modules_from_patterns(model, globs=["*"])) == ["a"]
    assert list(find_parameters_from_patterns(model, regex=["^b"])) == ["b.weight", "b.bias"]
    assert list(find_modules_of_type(layer, nn.Linear)) == [""]


def test_finders_refuse_what_they_cannot_use() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="globs or regex"):
        find_modules_from_patterns(model)
    with pytest.raises(ValueError, match=r"'\[' is not a regular expression"):
        find_parameters_from_patterns(model, regex="[")
    with pytest.raises(TypeError, match=r"nn\.Module classes"):
        find_modules_of_type(model, [int])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="not a str"):
        find_modules_of_type("model", [nn.Linear])  # type: ignore[arg-type]
