"""Rewriting a copy of a model: names, sharing, dtypes, flags, and filling empty chains."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compress.layers import kind_of
from compress.linalg.fit import Covariances, fit
from compress.linalg.problem import Problem
from compress.linalg.schemes import Ranks, scheme_named
from compress.network.chains import Chain, as_saved, build_chain, empty_chain, rewrite
from compress.network.sites import LayerSite, find_sites


class Twice(nn.Module):
    """One convolution under two names, called twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.again = nn.ModuleList([self.first])
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 25, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again[0](self.first(x).relu()))


def chain_of(module: nn.Module, scheme: str = "output", ranks: Ranks | None = None) -> Chain:
    """An exact chain unless ranks are given; the metric does not matter here."""
    kind = kind_of(module)
    assert kind is not None
    geometry, weight = kind.geometry(module), kind.weight(module).double()
    eye = torch.eye(geometry.in_features, dtype=torch.float64).expand(geometry.groups, -1, -1)
    matrix = weight.flatten(2)
    problem = Problem(geometry, weight, Covariances(matrix @ matrix.mT, eye))
    found = fit(problem, scheme, ranks or scheme_named(scheme).full_ranks(geometry))
    bias = module._parameters.get("bias")
    zero = torch.zeros(geometry.out_channels, dtype=torch.float64)
    return Chain(scheme, found.ranks, found.weights, zero if bias is None else bias.detach())


def sites_of(model: nn.Module, x: Tensor) -> dict[str, LayerSite]:
    return {site.name: site for site in find_sites(model, x)}


def test_a_shared_module_stays_shared() -> None:
    model, x = Twice(), torch.randn(2, 4, 5, 5)
    site = sites_of(model, x[:1])["first"]
    assert site.aliases == ("first", "again.0")
    new = rewrite(model, {"first": site}, {"first": chain_of(model.first, "spatial")})
    assert type(new.first) is nn.Sequential
    assert new.first is new.again[0]
    assert model.first is model.again[0]
    assert type(model.first) is nn.Conv2d
    torch.testing.assert_close(new(x), model(x), rtol=1e-4, atol=1e-5)


def test_names_inside_containers_and_the_source_is_untouched() -> None:
    model, x = Twice().train(), torch.randn(1, 4, 5, 5)
    before = copy.deepcopy(model.state_dict())
    sites = sites_of(model, x)
    new = rewrite(model, sites, {"head.1": chain_of(model.head[1], ranks=(2,))})
    assert [type(layer) for layer in new.head] == [nn.Flatten, nn.Sequential]
    assert type(model.head[1]) is nn.Linear
    assert new.training
    assert new.head[1].training
    assert new.first is not model.first
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_chains_take_the_dtype_of_the_layer(dtype: torch.dtype) -> None:
    layer = nn.Conv2d(6, 4, 3, padding=1).to(dtype)
    x = torch.randn(1, 6, 7, 7).to(dtype)
    new = rewrite(layer, sites_of(layer, x), {"": chain_of(layer, "spatial")})
    assert {parameter.dtype for parameter in new.parameters()} == {dtype}
    y = new(x)
    assert y.dtype == dtype
    near = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(y, layer(x), rtol=near, atol=near)


def test_requires_grad_and_training_flags_carry_over() -> None:
    layer = nn.Conv2d(4, 4, 3).eval()
    layer.weight.requires_grad_(False)
    chain = chain_of(layer)
    kind = kind_of(layer)
    assert kind is not None
    new = build_chain(kind.geometry(layer), chain, layer)
    assert not new.training
    assert not any(stage.training for stage in new)
    assert [(name, p.requires_grad) for name, p in new.named_parameters()] == [
        ("0.weight", False), ("1.weight", False), ("1.bias", True)
    ]  # fmt: skip


@pytest.mark.parametrize("scheme", ["output", "input", "two_sided", "spatial"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_empty_chain_is_filled_bit_for_bit(scheme: str, dtype: torch.dtype) -> None:
    layer = nn.Conv2d(4, 6, (3, 2), groups=2, bias=False).to(dtype)
    kind = kind_of(layer)
    assert kind is not None
    geometry = kind.geometry(layer)
    ranks = (1, 2) if scheme == "two_sided" else (2,)
    built = build_chain(geometry, chain_of(layer, scheme, ranks), layer)
    state = torch.get_rng_state()
    empty = empty_chain(geometry, scheme, ranks, layer)
    assert torch.equal(torch.get_rng_state(), state)
    empty.load_state_dict(built.state_dict(), strict=True)
    assert repr(empty) == repr(built)
    for key, value in built.state_dict().items():
        assert torch.equal(empty.state_dict()[key], value)
    x = torch.randn(2, 4, 6, 6).to(dtype)
    assert torch.equal(empty(x), built(x))


def test_nothing_to_rewrite_is_a_copy() -> None:
    model, x = Twice(), torch.randn(1, 4, 5, 5)
    new = rewrite(model, {}, {})
    assert new is not model
    assert torch.equal(new(x), model(x))


def test_a_chain_shares_no_storage_with_its_record() -> None:
    layer = nn.Conv2d(4, 4, 3).double()
    chain = chain_of(layer)
    kind = kind_of(layer)
    assert kind is not None
    built = build_chain(kind.geometry(layer), chain, layer)
    taken = {tensor.data_ptr() for tensor in (*chain.weights, chain.bias)}
    assert not taken & {parameter.data_ptr() for parameter in built.parameters()}


def test_a_model_lies_in_memory_as_it_will_be_read_back() -> None:
    """Strides of an axis of length 1 outlive `contiguous`; kernels are chosen by them."""
    model = nn.Sequential(nn.Linear(1, 9), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[0].weight = nn.Parameter(torch.empty_strided((9, 1), (1, 9)).fill_(0.5))
    model[1].weight = nn.Parameter(model[1].weight.detach().to(memory_format=torch.channels_last))
    saved = as_saved(model, torch.float16)
    for name, tensor in saved.state_dict().items():
        assert tensor.stride() == torch.empty(tensor.shape).stride(), name
        torch.testing.assert_close(tensor, model.state_dict()[name].to(tensor.dtype))
    assert {p.dtype for p in saved.parameters()} == {torch.float16}
    assert model[0].weight.stride() == (1, 9)
