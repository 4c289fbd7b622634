"""Combining convolutions and folding BatchNorm against running the layers one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import compress
from compress.errors import UnsupportedLayer
from compress.linalg.convolution import combine, fold_batch_norm
from compress.linalg.kernels import BatchNorm, compose_kernels, regroup

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def conv(*args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(*args, dtype=torch.float64, **kwargs)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_after_conv(mode: str, groups: int, stride: Any, bias: bool) -> None:
    torch.manual_seed(0)
    first = conv(
        4, 6, (3, 2), stride=stride, padding=(2, 1), dilation=2, groups=groups, padding_mode=mode,
        bias=bias,
    )  # fmt: skip
    second = conv(6, 8, 1, stride=2, groups=groups)
    x = torch.randn(2, 4, 11, 12, dtype=torch.float64)
    both = combine(first, second)
    torch.testing.assert_close(both(x), second(first(x)), **EXACT)
    assert both.padding_mode == mode
    assert both.groups == groups
    assert both.dilation == (2, 2)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [1, (0, 2), "same", "valid"])
def test_conv_after_pointwise(mode: str, groups: int, padding: Any) -> None:
    torch.manual_seed(0)
    # A bias before padding is exact unless the padding is zeros.
    first = conv(4, 6, 1, groups=groups, bias=mode != "zeros" or padding == "valid")
    second = conv(6, 4, (2, 3), padding=padding, dilation=2, groups=groups, padding_mode=mode)
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    torch.testing.assert_close(combine(first, second)(x), second(first(x)), **EXACT)


def test_strided_pointwise_before_a_zero_padded_conv() -> None:
    first, second = conv(3, 4, 1, stride=2, bias=False), conv(4, 5, 3, padding=1, stride=2)
    for size in (7, 8, 9, 10):
        x = torch.randn(1, 3, size, size + 1, dtype=torch.float64)
        torch.testing.assert_close(combine(first, second)(x), second(first(x)), **EXACT)


def test_depthwise_then_pointwise_and_the_other_order() -> None:
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    depthwise, pointwise = conv(6, 6, 3, padding=1, groups=6), conv(6, 9, 1)
    torch.testing.assert_close(combine(depthwise, pointwise)(x), pointwise(depthwise(x)), **EXACT)
    narrow, grouped = conv(6, 8, 1, bias=False), conv(8, 8, 3, padding=1, groups=4)
    torch.testing.assert_close(combine(narrow, grouped)(x), grouped(narrow(x)), **EXACT)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[nn.Conv2d, nn.Conv2d, torch.Tensor]:
    small = st.integers(1, 3)
    two = st.tuples(small, small)
    groups1, groups2 = draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (1, 4), (3, 2)]))
    hidden = 12
    torch.manual_seed(draw(st.integers(0, 999)))
    pads = st.tuples(st.integers(0, 2), st.integers(0, 2))
    mode = st.sampled_from(["zeros", "reflect", "replicate", "circular"])
    first = conv(
        12, hidden, draw(two), stride=draw(two), padding=draw(pads), dilation=draw(two),
        groups=groups1, bias=draw(st.booleans()), padding_mode=draw(mode),
    )  # fmt: skip
    second = conv(
        hidden, 4 * groups2, draw(two), stride=draw(two), padding=draw(pads), dilation=draw(two),
        groups=groups2, bias=draw(st.booleans()), padding_mode=draw(mode),
    )  # fmt: skip
    size = (draw(st.integers(24, 28)), draw(st.integers(24, 28)))
    return first, second, torch.randn(1, 12, *size, dtype=torch.float64)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(pairs())
def test_any_pair_is_exact_or_refused(case: tuple[nn.Conv2d, nn.Conv2d, torch.Tensor]) -> None:
    first, second, x = case
    expected = second(first(x))
    try:
        both = combine(first, second)
    except UnsupportedLayer:
        assert any(second.padding), "without padding on the second everything composes"
        return
    torch.testing.assert_close(both(x), expected, **EXACT)


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ({"kernel_size": 3}, {"kernel_size": 1, "padding": 1}, "reads padding"),
        ({"kernel_size": 1}, {"kernel_size": 3, "padding": 1}, "has a bias"),
        (
            {"kernel_size": 1, "padding": 1, "padding_mode": "reflect"},
            {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
            "padding modes differ",
        ),
        (
            {"kernel_size": 1, "stride": 2},
            {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
            "stride of 2",
        ),
        (
            {"kernel_size": 1, "padding": 1, "padding_mode": "reflect"},
            {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
            "one larger padding",
        ),
        ({"kernel_size": 2, "padding": "same"}, {"kernel_size": 1, "stride": 2}, "unequal"),
    ],
)
def test_refusals_name_the_reason(
    first: dict[str, Any], second: dict[str, Any], reason: str
) -> None:
    a, b = conv(4, 4, **first), conv(4, 4, **second)
    with pytest.raises(UnsupportedLayer, match=reason):
        combine(a, b)


def test_layers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UnsupportedLayer, match="4 output channels and the second takes 5"):
        combine(conv(3, 4, 1), conv(5, 4, 1))
    with pytest.raises(UnsupportedLayer, match=r"torch\.float32"):
        combine(conv(3, 4, 1), nn.Conv2d(4, 4, 1))
    with pytest.raises(UnsupportedLayer, match="second is a ConvTranspose2d"):
        combine(conv(3, 4, 1), nn.ConvTranspose2d(4, 4, 1))  # type: ignore[arg-type]


def test_public_name_attributes_and_untouched_arguments() -> None:
    assert compress.combine is combine
    first, second = nn.Conv2d(3, 4, 3, padding=1).half(), nn.Conv2d(4, 5, 1).half().eval()
    first.requires_grad_(False)
    second.requires_grad_(False)
    before = [p.clone() for p in (*first.parameters(), *second.parameters())]
    both = combine(first, second)
    assert both.weight.dtype == torch.float16
    assert not both.training
    assert not both.weight.requires_grad
    for old, new in zip(before, (*first.parameters(), *second.parameters()), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(("taps1", "taps2"), [((3, 2), (2, 3)), ((1, 1), (2, 3)), ((3, 3), (1, 1))])
def test_compose_kernels_equals_the_definition(taps1: Any, taps2: Any) -> None:
    torch.manual_seed(0)
    groups, steps1, steps2 = 2, (2, 1), (1, 3)
    first = torch.randn(6, 2, *taps1, dtype=torch.float64)
    second = torch.randn(4, 3, *taps2, dtype=torch.float64)
    size = [
        (a - 1) * s + (b - 1) * t + 1
        for a, s, b, t in zip(taps1, steps1, taps2, steps2, strict=True)
    ]
    expected = torch.zeros(4, 2, *size, dtype=torch.float64)
    for out in range(4):
        for inner in range(3):
            hidden = out // 2 * 3 + inner
            for p, q in [(p, q) for p in range(taps1[0]) for q in range(taps1[1])]:
                for r, s in [(r, s) for r in range(taps2[0]) for s in range(taps2[1])]:
                    y, x = p * steps1[0] + r * steps2[0], q * steps1[1] + s * steps2[1]
                    expected[out, :, y, x] += second[out, inner, r, s] * first[hidden, :, p, q]
    composed = compose_kernels(first, second, groups=groups, steps1=steps1, steps2=steps2)
    torch.testing.assert_close(composed, expected, **EXACT)


def test_regroup_keeps_the_function() -> None:
    layer = conv(12, 8, 3, groups=4, bias=False)
    x = torch.randn(1, 12, 5, 5, dtype=torch.float64)
    for fewer in (1, 2, 4):
        merged = regroup(layer.weight, 4, fewer)
        torch.testing.assert_close(
            torch.nn.functional.conv2d(x, merged, groups=fewer), layer(x), **EXACT
        )


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "transposed"])
def test_fold_batch_norm(kind: str, affine: bool, bias: bool) -> None:
    torch.manual_seed(0)
    groups = 2 if kind in ("grouped", "transposed") else 1
    layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d
    norm: nn.BatchNorm1d | nn.BatchNorm2d
    if kind == "linear":
        layer, norm = nn.Linear(4, 6, bias=bias), nn.BatchNorm1d(6, eps=0.3, affine=affine)
        x = torch.randn(5, 4, dtype=torch.float64)
    else:
        make = nn.ConvTranspose2d if kind == "transposed" else nn.Conv2d
        layer = make(4, 6, 3, stride=2, padding=1, groups=groups, bias=bias)
        norm = nn.BatchNorm2d(6, eps=0.3, affine=affine)
        x = torch.randn(5, 4, 7, 7, dtype=torch.float64)
    layer, norm = layer.double(), norm.double().eval()
    for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        if tensor is not None:
            tensor.data.uniform_(0.5, 2)
    if affine:
        norm.weight.data[0] = 0  # a dead channel
    expected = norm(layer(x))
    statistics = BatchNorm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    weight, shift = fold_batch_norm(
        layer.weight, layer.bias, statistics, transposed=kind == "transposed", groups=groups
    )
    layer.weight = nn.Parameter(weight)
    layer.bias = nn.Parameter(shift)
    torch.testing.assert_close(layer(x), expected, **EXACT)


def test_fold_batch_norm_refuses_other_channels() -> None:
    with pytest.raises(UnsupportedLayer, match="6 output channels"):
        fold_batch_norm(
            torch.ones(6, 3), None, BatchNorm(torch.zeros(5), torch.ones(5), None, None, 1e-5)
        )
