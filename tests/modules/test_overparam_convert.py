"""`overparameterize` and `collapse`: outputs and sharing kept, or refused with nothing changed."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from module_trees import sample, trees
from torch import nn

from compress.errors import UnsupportedLayer
from compress.modules.overparam import OverparamConv2d, OverparamLinear, collapse, overparameterize
from compress.vision.torchvision import torchvision_model

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def chains(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, OverparamConv2d | OverparamLinear)]


def same_sharing(one: nn.Module, other: nn.Module) -> bool:
    """Whether the two trees have equal modules at equal pairs of names."""

    def groups(model: nn.Module) -> set[frozenset[str]]:
        found: dict[int, set[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            found.setdefault(id(module), set()).add(name)
        return {frozenset(names) for names in found.values()}

    return groups(one) == groups(other)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(trees())
def test_any_tree_keeps_its_output_and_sharing(model: nn.Module) -> None:
    x = sample()
    expected = model(x)
    state = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*it shares a parameter")
        expanded = overparameterize(model, depth=3, width=1.5, inplace=False)
    torch.testing.assert_close(expanded(x), expected, **EXACT)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert not chains(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    back = collapse(expanded)
    torch.testing.assert_close(back(x), expected, **EXACT)
    assert not chains(back)
    assert same_sharing(model, back)
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in back.parameters()) == parameters


def test_resnet18_keeps_its_outputs() -> None:
    torch.manual_seed(0)
    model = torchvision_model("resnet18").double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expanded = overparameterize(model, inplace=False)
    assert len(chains(expanded)) == 21
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(expanded(x), expected, **EXACT)
        torch.testing.assert_close(collapse(expanded)(x), expected, **EXACT)


LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(6, 6),
    "no bias": lambda: nn.Linear(6, 6, bias=False),
    "strided": lambda: nn.Conv2d(6, 6, 3, 2, 1),
    "grouped": lambda: nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3, padding_mode="circular"),
    "rectangular": lambda: nn.Conv2d(6, 6, (1, 5), padding="same", bias=False),
    "pointwise": lambda: nn.Conv2d(6, 6, 1),
}


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("intervals", [None, -1, 1, 2, [1, 2], [3, 4]])
@pytest.mark.parametrize("name", LAYERS)
def test_preserving_with_branches_and_batch_norm(
    name: str, intervals: Any, batch_norm: bool
) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    x = torch.randn(2, 6, 6, 6, dtype=torch.float64)
    new = overparameterize(
        layer, depth=4, batch_norm=batch_norm, residual=intervals is not None,
        residual_intervals=intervals or 2,
    )  # fmt: skip
    assert new.training
    torch.testing.assert_close(new.eval()(x), layer(x), **EXACT)
    new(x).square().sum().backward()
    for factor in new.layers:
        assert factor.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("kernels", "width"),
    [([3, 1], 1), ([1, 3], 1), ([1, 3, 1], 1), ([(1, 3), (3, 1)], 3), ([(3, 1), 1, (1, 3)], 3),
     ([1, (3, 1), (1, 3), 1], 3), (3, 2), ((3, 3), 1)],
)  # fmt: skip
@pytest.mark.parametrize("groups", [1, 2])
def test_preserving_in_any_chain_that_can_hold_the_layer(
    kernels: Any, width: float, groups: int
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=groups).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    if isinstance(kernels, tuple):
        with pytest.warns(UserWarning, match="as one 3x3 kernel"):
            new = overparameterize(layer, kernel_sizes=kernels, width=width)
    else:
        new = overparameterize(layer, kernel_sizes=kernels, width=width)
    torch.testing.assert_close(new(x), layer(x), **EXACT)
    torch.testing.assert_close(new.eval()(x), layer(x), **EXACT)


def test_a_low_rank_weight_fits_a_bottleneck_of_its_rank() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 8).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 2).double() @ torch.randn(2, 12).double())
    new = overparameterize(layer, width=0.25)
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(new(x), layer(x), **EXACT)
    with pytest.raises(UnsupportedLayer, match=r"has rank 2 where the chain .* has 1 hidden"):
        overparameterize(layer, width=0.2)


@pytest.mark.parametrize(
    ("layer", "options", "words"),
    [
        (nn.Conv2d(3, 4, 5), {"kernel_sizes": [3, 3]}, "0.conv has a kernel of 5x5, which the"),
        (nn.Conv2d(3, 4, 5), {"kernel_sizes": [3, 1]}, "kernel of 5x5 and the chain .* 3x3"),
        (nn.Conv2d(3, 4, 5), {"kernel_sizes": [3, 1], "init": "fresh"}, "kernel of 5x5 and"),
        (nn.Linear(8, 8), {"width": 0.5}, "0.conv has rank 8 where the chain .* has 4 hidden"),
        (nn.Conv2d(8, 8, 3, groups=2), {"width": 0.5}, "4 where .* 2 hidden channels a group"),
        (nn.Conv2d(4, 4, 3, groups=4), {"width": 0.5}, "0.conv cannot be over-parameterised"),
        (nn.Linear(3, 4), {"residual": True}, "3 in and 4 out|3 channels in and 4 out"),
        (nn.Conv2d(4, 4, 3), {"residual": True, "kernel_sizes": [(3, 1), (1, 3), 1],
                              "residual_intervals": 1}, "residual branches inside it"),
    ],
)  # fmt: skip
def test_what_a_chain_cannot_hold_is_refused_and_nothing_changes(
    layer: nn.Module, options: dict[str, Any], words: str
) -> None:
    model = nn.Sequential(nn.Sequential(), nn.Linear(2, 2))
    model[0].add_module("conv", layer)
    before = list(model.named_modules())
    with pytest.raises(ValueError, match=words):
        overparameterize(model, include="0.*", inplace=True, **options)
    assert list(model.named_modules()) == before


def test_fresh_weights_for_any_chain_of_the_right_kernel() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.ReLU(), nn.Conv2d(4, 4, 5))
    new = overparameterize(model, kernel_sizes=[3, 3], init="fresh", width=2, inplace=False)
    x = torch.randn(1, 3, 12, 12)
    assert new(x).shape == model(x).shape
    assert not torch.allclose(new(x), model(x))
    assert new[0].layers[0].weight.shape == (8, 3, 3, 3)


def test_root_names_patterns_and_inplace() -> None:
    root = nn.Linear(3, 3)
    assert isinstance(overparameterize(root), OverparamLinear)
    assert isinstance(collapse(overparameterize(root)), nn.Linear)
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    some = overparameterize(model, include=["1.*"], inplace=False)
    assert type(some[0]) is nn.Linear
    assert isinstance(some[1][0], OverparamLinear)
    others = overparameterize(model, exclude="1.*", inplace=False)
    assert isinstance(others[0], OverparamLinear)
    assert type(others[1][0]) is nn.Linear
    assert not chains(model)
    assert overparameterize(model) is model  # in place unless told otherwise, as the original
    assert len(chains(model)) == 2
    before = list(model.named_modules())
    assert overparameterize(model) is model
    assert list(model.named_modules()) == before
    assert len(chains(model)) == 2
    assert collapse(model, inplace=True) is model
    assert not chains(model)


def test_unknown_patterns_and_inits_are_refused() -> None:
    model = nn.Sequential()
    model.add_module("encoder", nn.Linear(3, 3))
    model.add_module("act", nn.ReLU())
    with pytest.raises(ValueError, match=r"'encodr' matches no .* Did you mean 'encoder'"):
        overparameterize(model, include="encodr")
    with pytest.raises(ValueError, match=r"'act' matches no .* other kinds: ReLU"):
        overparameterize(model, exclude="act")
    with pytest.raises(ValueError, match="'random'"):
        overparameterize(model, init="random")  # type: ignore[arg-type]


def test_shared_layers_stay_shared_and_excluded_aliases_win() -> None:
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": layer, "b": layer})
    new = overparameterize(model, inplace=False)
    assert isinstance(new["a"], OverparamLinear)
    assert new["a"] is new["b"]
    kept = overparameterize(model, exclude="b", inplace=False)
    assert type(kept["a"]) is nn.Linear
    twin = nn.Linear(3, 3)
    twin.weight, twin.bias = layer.weight, layer.bias
    new = overparameterize(nn.ModuleDict({"a": layer, "b": twin}))
    assert isinstance(new["a"], OverparamLinear)
    assert new["a"] is new["b"]


def test_a_weight_tied_to_an_embedding_is_kept_with_a_warning() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "body": nn.Linear(3, 3)})
    model["head"] = nn.Linear(3, 5, bias=False)
    model["head"].weight = model["embed"].weight
    with pytest.warns(UserWarning, match="head is kept as it is: it shares a parameter with embed"):
        new = overparameterize(model)
    assert new["head"].weight is new["embed"].weight
    assert isinstance(new["body"], OverparamLinear)


def test_attributes_carry_over() -> None:
    calls: list[int] = []
    layer = nn.Conv2d(4, 6, 3, 2, padding=1, dilation=2, groups=2, padding_mode="reflect").half()
    layer.requires_grad_(False).eval()
    layer.register_forward_hook(lambda *_: calls.append(1))
    new = overparameterize(layer)
    assert isinstance(new, OverparamConv2d)
    assert (new.stride, new.padding, new.dilation) == ((2, 2), (1, 1), (2, 2))
    assert (new.groups, new.padding_mode, new.training) == (2, "reflect", False)
    assert {p.dtype for p in new.parameters()} == {torch.float16}
    assert not any(p.requires_grad for p in new.parameters())
    x = torch.randn(1, 4, 9, 9).half()
    difference = (new(x) - layer(x)).abs().max() / layer(x).abs().max()
    assert difference < 1e-2
    plain = collapse(new)
    plain(x)
    assert len(calls) == 4
    assert not plain.weight.requires_grad
    assert not plain.training
    meta = overparameterize(nn.Linear(3, 3, device="meta"))
    assert all(p.is_meta for p in meta.parameters())


def test_subclasses_and_computed_weights_are_left_alone() -> None:
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(Mine(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    said = r"Kept as they are, .*: 0 \(Mine\), 1 \(ParametrizedLinear\)\. List them in ignore"
    with pytest.warns(UserWarning, match=said):
        assert not chains(overparameterize(model))
    assert not chains(overparameterize(model, ignore=list(model)))
    assert not chains(overparameterize(model, exclude="*"))


def test_training_after_conversion_and_collapsing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
    ).double()
    new = overparameterize(model, depth=3, width=2)
    optimiser = torch.optim.Adam(new.parameters(), lr=1e-2)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    first = new(x).square().mean()
    for _ in range(3):
        optimiser.zero_grad()
        loss = new(x).square().mean()
        loss.backward()
        optimiser.step()
    assert new(x).square().mean() < first
    torch.testing.assert_close(collapse(new)(x), new(x), **EXACT)
    torch.testing.assert_close(new.eval()(x), new.train()(x), **EXACT)


@pytest.mark.parametrize("inplace", [True, False])
def test_conversion_by_kind_and_with_modules_to_ignore(inplace: bool) -> None:
    def network() -> nn.Module:
        features = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3))
        return nn.Sequential(features, nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2))

    def kinds(model: nn.Module) -> list[str]:
        return [type(m).__name__ for m in (model[0][0], model[0][2], model[2], model[3])]  # type: ignore[index]

    def converted(model: nn.Module, **options: Any) -> list[str]:
        return kinds(overparameterize(model, init="fresh", inplace=inplace, **options))

    assert converted(network(), overparam="conv") == [
        "OverparamConv2d", "OverparamConv2d", "Linear", "Linear",
    ]  # fmt: skip
    assert converted(network(), overparam="fc") == [
        "Conv2d", "Conv2d", "OverparamLinear", "OverparamLinear",
    ]  # fmt: skip
    model = network()
    assert converted(model, ignore=[model[0], model[3]]) == [  # type: ignore[index]
        "Conv2d", "Conv2d", "OverparamLinear", "Linear",
    ]  # fmt: skip
    model = network()
    assert converted(model, ignore=model[0]) == [  # type: ignore[index]
        "Conv2d", "Conv2d", "OverparamLinear", "OverparamLinear",
    ]  # fmt: skip
    model = network()
    before = list(model.named_modules())
    with pytest.raises(ValueError, match="overparam='linear' is unknown"):
        overparameterize(model, overparam="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a Linear that is not in the model"):
        overparameterize(model, ignore=[nn.Linear(2, 2)])
    with pytest.raises(TypeError, match="not 'features'; exclude takes names"):
        overparameterize(model, ignore=["features"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="positional"):
        overparameterize(model, 2, 1, "all")  # type: ignore[misc]
    assert list(model.named_modules()) == before


def test_an_optimiser_made_before_the_conversion_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="optimiser made before .* holds 2 parameters"):
        overparameterize(model, exclude="1")
    overparameterize(model, inplace=False)  # the model itself keeps what the optimiser holds
    del early
    late = torch.optim.SGD(model[0].parameters(), lr=0.1)
    overparameterize(model)  # converts the other layer
    model[0](torch.ones(1, 3)).sum().backward()
    before = model[0].layers[0].weight.clone()
    late.step()
    assert not torch.equal(model[0].layers[0].weight, before)


def test_branches_over_even_kernels_keep_the_function() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    for padding in (0, 1, "same"):
        for intervals in (1, 2, -1, [1, 2]):
            layer = nn.Conv2d(4, 4, (2, 4), padding=padding).double()
            new = overparameterize(
                layer, kernel_sizes=[(2, 4), 1], residual=True, residual_intervals=intervals
            )
            if padding == "same":
                with warnings.catch_warnings():  # torch warns once in a process
                    warnings.filterwarnings("ignore", message=".*even kernel")
                    expected = layer(x)
            else:
                expected = layer(x)
            torch.testing.assert_close(new(x), expected, **EXACT)
            torch.testing.assert_close(new.eval()(x), expected, **EXACT)
