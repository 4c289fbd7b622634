"""Over-parameterised layers: the collapsed form against a chain written out by hand."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.modules.overparam import OverparamConv2d, OverparamLinear

EXACT = {"rtol": 1e-9, "atol": 1e-9}
Layer = OverparamConv2d | OverparamLinear


def unsettle(layer: nn.Module) -> None:
    """Random biases and statistics, an odd eps and a dead BatchNorm channel."""
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eps = 0.37
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.1, 2)
            nn.init.uniform_(module.weight, -1, 2)
            nn.init.uniform_(module.bias, -1, 1)
            module.weight.data[0] = 0
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.uniform_(module.bias, -1, 1)


def by_hand(layer: OverparamConv2d, x: Tensor) -> Tensor:
    """Pad, then every sublayer by its definition; a branch is a convolution with a Dirac kernel."""
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "same":
        sides = [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
    elif layer.padding == "valid":
        sides = [0, 0, 0, 0]
    else:
        sides = [layer.padding[1]] * 2 + [layer.padding[0]] * 2
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    nodes = [F.pad(x, sides, mode=mode)]
    intervals = layer.residual_intervals
    intervals = [intervals] if isinstance(intervals, int) else list(intervals)
    intervals = sorted({layer.depth if n == -1 else n for n in intervals})
    for m, sub in enumerate(layer.layers, start=1):
        stride = layer.stride if m == layer.depth else (1, 1)
        y = F.conv2d(nodes[-1], sub.weight, sub.bias, stride, 0, layer.dilation, layer.groups)
        if layer.batch_norm:
            norm = layer.norms[m - 1]
            columns = [
                t.reshape(1, -1, 1, 1)
                for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            ]
            mean, var, gamma, beta = columns
            y = gamma * (y - mean) / torch.sqrt(var + norm.eps) + beta
        for n in intervals if layer.residual else []:
            if m % n == 0:
                source = nodes[m - n]
                parts = layer.kernel_sizes[m - n : m]
                size = [sum(k[axis] for k in parts) - n + 1 for axis in (0, 1)]
                kernel = torch.zeros(source.shape[1], 1, *size, dtype=x.dtype)
                early = layer.padding == "same"  # pads the odd one last
                kernel[:, 0, (size[0] - early) // 2, (size[1] - early) // 2] = 1
                channels = source.shape[1]
                y = y + F.conv2d(source, kernel, None, stride, 0, layer.dilation, channels)
        nodes.append(y)
    return nodes[-1]


def grid() -> Iterator[dict[str, Any]]:
    kernels = ([3], [3, 1], [1, 3, 1], [3, 3], [2, 2, 1], [(1, 3), (3, 1)], [(2, 5), 1])
    for chain, stride, groups, batch_norm in itertools.product(
        kernels, (1, 2, (1, 3)), (1, 2), (False, True)
    ):
        yield {
            "kernel_sizes": chain, "stride": stride, "groups": groups, "batch_norm": batch_norm,
        }  # fmt: skip


MODES = ["zeros", "reflect", "replicate", "circular"]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", MODES)
def test_collapse_equals_the_chain_over_the_grid(mode: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 10, 11, dtype=torch.float64)
    every = list(itertools.product(grid(), (1, 2), (0, 1, (2, 1), "same", "valid")))
    # A quarter of the grid a mode; the four modes together walk through all of it.
    for options, dilation, padding in every[MODES.index(mode) :: 4]:
        if padding == "same" and options["stride"] != 1:
            continue
        bias = options["stride"] != 2
        layer = OverparamConv2d(
            4, 6, padding=padding, dilation=dilation, padding_mode=mode, width=1.34, bias=bias,
            dtype=torch.float64, **options,
        )  # fmt: skip
        unsettle(layer)
        layer.eval()
        expected = by_hand(layer, x)
        torch.testing.assert_close(layer(x), expected, **EXACT)
        torch.testing.assert_close(layer.forward_expanded(x), expected, **EXACT)
        torch.testing.assert_close(layer.collapse()(x), expected, **EXACT)


@pytest.mark.parametrize("intervals", [1, 2, 3, -1, [1, 2], [1, 3], [2, -1], [1, 2, 3, 4]])
@pytest.mark.parametrize("kernels", [[3, 1, 3, 1], [1, 5, 1, 1], [(3, 1), (1, 3), 3, 1]])
def test_residual_branches_for_every_stride_and_padding(kernels: Any, intervals: Any) -> None:
    torch.manual_seed(1)
    every = itertools.product((1, 2, 3, (2, 1)), (0, 1, 2, (0, 3)), (1, 2), (False, True), (1, 2))
    for stride, padding, groups, batch_norm, dilation in list(every)[len(str(intervals)) % 7 :: 7]:
        layer = OverparamConv2d(
            4, 4, kernels, stride=stride, padding=padding, groups=groups, batch_norm=batch_norm,
            dilation=dilation, residual=True, residual_intervals=intervals, dtype=torch.float64,
        )  # fmt: skip
        unsettle(layer)
        layer.eval()
        x = torch.randn(1, 4, 13, 14, dtype=torch.float64)
        expected = by_hand(layer, x)
        torch.testing.assert_close(layer(x), expected, **EXACT)
        torch.testing.assert_close(layer.forward_expanded(x), expected, **EXACT)


def test_whole_depth_branch_with_another_hidden_size() -> None:
    layer = OverparamConv2d(
        4, 4, [3, 3], padding=2, stride=2, width=0.5, residual=True, residual_intervals=-1,
        dtype=torch.float64,
    ).eval()  # fmt: skip
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_hand(layer, x), **EXACT)


sizes = st.one_of(st.integers(1, 4), st.tuples(st.integers(1, 3), st.integers(1, 4)))


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    kernels=st.lists(sizes, min_size=1, max_size=4),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2, 4]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    width=st.sampled_from([1, 2, 3]),
    bias=st.booleans(),
    batch_norm=st.booleans(),
    intervals=st.sampled_from([None, 1, -1]),
)
def test_any_geometry_is_exact(
    kernels: list[Any], stride: Any, padding: Any, dilation: Any, groups: int, mode: str,
    width: int, bias: bool, batch_norm: bool, intervals: int | None,
) -> None:  # fmt: skip
    torch.manual_seed(len(kernels))
    if intervals == 1:
        width = 1
    make = lambda: OverparamConv2d(  # noqa: E731
        4, 4, kernels, stride, padding, dilation=dilation, groups=groups, padding_mode=mode,
        width=width, bias=bias, batch_norm=batch_norm, residual=intervals is not None,
        residual_intervals=intervals or 2, dtype=torch.float64,
    )  # fmt: skip
    layer = make()
    unsettle(layer)
    layer.eval()
    x = torch.randn(1, 4, 27, 28, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_hand(layer, x), **EXACT)


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4)])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("depth", "width", "intervals"), [(1, 1, None), (2, 3, None), (3, 0.5, -1), (4, 1, [1, 2])]
)
def test_linear(
    shape: tuple[int, ...], batch_norm: bool, bias: bool, depth: int, width: float, intervals: Any
) -> None:
    torch.manual_seed(0)
    layer = OverparamLinear(
        4, 4, width, depth, bias=bias, batch_norm=batch_norm, residual=intervals is not None,
        residual_intervals=intervals or 2, dtype=torch.float64,
    )  # fmt: skip
    unsettle(layer)
    layer.eval()
    x = torch.randn(*shape, dtype=torch.float64)
    nodes = [x]
    wanted = [intervals] if isinstance(intervals, int) else intervals or []
    wanted = [depth if n == -1 else n for n in wanted]
    for m, sub in enumerate(layer.layers, start=1):
        y = nodes[-1] @ sub.weight.T + (sub.bias if bias else 0)
        if batch_norm:
            n = layer.norms[m - 1]
            y = n.weight * (y - n.running_mean) / torch.sqrt(n.running_var + n.eps) + n.bias
        y = y + sum(nodes[m - n] for n in wanted if m % n == 0)
        nodes.append(y)
    torch.testing.assert_close(layer(x), nodes[-1], **EXACT)
    torch.testing.assert_close(layer.forward_expanded(x), nodes[-1], **EXACT)
    torch.testing.assert_close(layer.collapse()(x), nodes[-1], **EXACT)


def layers() -> list[Layer]:
    torch.manual_seed(0)
    return [
        OverparamLinear(6, 6, width=2, depth=3, residual=False, batch_norm=True),
        OverparamConv2d(6, 6, [3, 3], padding=2, stride=2, batch_norm=True, groups=2),
        OverparamConv2d(6, 6, 3, depth=3, residual=True, residual_intervals=[1, 3]),
    ]


def example(layer: Layer, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (3, 6) if isinstance(layer, OverparamLinear) else (3, 6, 8, 8)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("which", range(3))
def test_train_and_eval_agree_and_return_self(which: int) -> None:
    layer = layers()[which].double()
    x = example(layer, torch.float64)
    assert layer.train() is layer
    expanded = layer(x)
    keys = list(layer.state_dict())
    assert layer.eval() is layer
    collapsed = layer(x)
    assert list(layer.state_dict()) == keys
    if not layer.batch_norm:
        torch.testing.assert_close(collapsed, expanded, **EXACT)
    torch.testing.assert_close(collapsed, layer.forward_expanded(x), **EXACT)


@pytest.mark.parametrize("which", range(3))
def test_weight_and_bias_are_readable_before_the_first_eval(which: int) -> None:
    layer = layers()[which]
    assert layer.training
    weight, bias = layer.weight, layer.bias
    plain = layer.eval().collapse()
    assert torch.equal(weight, plain.weight)
    assert bias is not None
    assert torch.equal(bias, plain.bias)
    assert type(plain) in (nn.Linear, nn.Conv2d)
    bare = OverparamLinear(3, 3, bias=False)
    assert bare.bias is None
    assert bare.collapse().bias is None


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("how", ["load", "optimiser", "in place", "replaced", "eps", "inference"])
def test_eval_is_never_stale(which: int, how: str) -> None:
    layer = layers()[which].double().eval()
    x = example(layer, torch.float64)
    with torch.no_grad():
        before = layer(x)
        assert layer._kept is not None
        assert torch.equal(layer(x), before)
    if how == "load":
        other = copy.deepcopy(layer)
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1)
        layer.load_state_dict(other.state_dict())
    elif how == "optimiser":
        optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer(x).square().sum().backward()
        optimiser.step()
    elif how == "in place":
        with torch.no_grad():
            layer.layers[-1].weight[0] += 1
    elif how == "replaced":
        layer.layers[0].weight = nn.Parameter(layer.layers[0].weight.detach() + 1)
    elif how == "eps":
        if not layer.batch_norm:
            return
        layer.norms[0].eps = 3.0
    else:
        with torch.inference_mode():
            layer.layers[0].weight.mul_(2)
            torch.testing.assert_close(layer(x), layer.forward_expanded(x), **EXACT)
    with torch.no_grad():
        after = layer(x)
        torch.testing.assert_close(after, layer.forward_expanded(x), **EXACT)
        assert not torch.allclose(before, after)


def test_a_weight_kept_under_inference_mode_serves_training_later() -> None:
    layer = layers()[1].eval()
    with torch.inference_mode():
        layer(example(layer))
    layer.requires_grad_(False)
    x = example(layer).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


def test_factors_without_a_version_are_recomputed() -> None:
    with torch.inference_mode():
        layer = OverparamLinear(4, 4).eval()
        first = layer(torch.ones(1, 4))
        layer.layers[0].weight.mul_(2)
        torch.testing.assert_close(layer(torch.ones(1, 4)), 2 * first)
    assert layer._kept is None


@pytest.mark.parametrize("which", range(3))
def test_gradients_reach_every_factor_and_match_the_chain(which: int) -> None:
    layer = layers()[which].double().eval()
    x = example(layer, torch.float64)
    collapsed = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    expanded = torch.autograd.grad(
        layer.forward_expanded(x).square().sum(), list(layer.parameters())
    )
    for one, other in zip(collapsed, expanded, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    with torch.no_grad():
        for parameter, slope in zip(layer.parameters(), collapsed, strict=True):
            parameter -= 1e-2 * slope
    torch.testing.assert_close(layer.collapse()(x), layer.forward_expanded(x), **EXACT)


@pytest.mark.parametrize("which", range(3))
def test_half_precision(which: int) -> None:
    layer = layers()[which].eval()
    exact = layer.double()(example(layer, torch.float64))
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(layer).to(dtype)
        y = half(example(layer, dtype))
        assert y.dtype == dtype
        scale = exact.abs().max()
        limit = 1e-2 if dtype == torch.float16 else 5e-2
        assert (y.double() - exact).abs().max() / scale < limit


@pytest.mark.parametrize("which", range(3))
def test_round_trips(which: int) -> None:
    layer = layers()[which].eval()
    x = example(layer)
    with torch.no_grad():
        y = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
            assert other._kept is None
            assert torch.equal(other(x), y)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        fresh = layers()[which].eval()
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(fresh(x), y)
        assert layer.double()(x.double()).dtype == torch.float64
        torch.testing.assert_close(layer(x.double()).float(), y)
    on_meta = copy.deepcopy(layer).to("meta")
    assert on_meta(x.double().to("meta")).shape == y.shape
    assert on_meta.collapse().weight.is_meta


def test_copies_do_not_share_the_kept_weight() -> None:
    layer = OverparamLinear(3, 3).eval()
    with torch.no_grad():
        layer(torch.ones(1, 3))
        other = copy.deepcopy(layer)
        other.layers[0].weight.zero_()
        assert not torch.equal(layer(torch.ones(1, 3)), other(torch.ones(1, 3)))


def test_torch_func_and_compile() -> None:
    layer = layers()[1].double().eval()
    x = example(layer, torch.float64)
    with torch.no_grad():
        y = layer(x)
    params = {k: v.detach() for k, v in layer.named_parameters()}
    stacked = {k: torch.stack([v, 2 * v]) for k, v in params.items()}
    run = lambda p: torch.func.functional_call(layer, p, (x,))  # noqa: E731
    batched = torch.func.vmap(run)(stacked)
    torch.testing.assert_close(batched[0], y, **EXACT)
    torch.testing.assert_close(batched[1], run({k: 2 * v for k, v in params.items()}), **EXACT)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
        compiled = torch.compile(layer, backend="eager")
        torch.testing.assert_close(compiled(x), y, **EXACT)
        layer.layers[0].weight.mul_(2)
        torch.testing.assert_close(compiled(x), layer.forward_expanded(x), **EXACT)


def test_a_frozen_layer_keeps_its_weight_between_calls_with_grad() -> None:
    layer = OverparamConv2d(3, 3).requires_grad_(False).eval()
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    kept = layer._kept
    layer(x)
    assert kept is not None
    assert layer._kept is kept


def test_unbatched_input() -> None:
    layer = OverparamConv2d(3, 4, [3, 1], batch_norm=True)
    x = torch.randn(3, 6, 6)
    assert layer(x).shape == layer.eval()(x).shape == (4, 6, 6)


def test_a_failed_forward_changes_nothing() -> None:
    conv = OverparamConv2d(3, 4, [3, 3], padding=0, batch_norm=True)
    linear = OverparamLinear(3, 4, batch_norm=True)
    linear.layers[1] = nn.Linear(5, 4)  # does not fit what the first gives
    for layer, x in ((conv, torch.randn(2, 3, 4, 4)), (linear, torch.randn(2, 3))):
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(RuntimeError):
            layer(x)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name])
    good = torch.randn(2, 3, 6, 6)
    conv(good)
    assert conv.norms[0].num_batches_tracked.item() == 1


def test_initialisation() -> None:
    torch.manual_seed(0)
    conv = OverparamConv2d(64, 256, [3, 1], batch_norm=True)
    for sub, gain in zip(conv.layers, (1, 2**0.5), strict=True):
        fan_out = sub.weight.shape[0] * sub.weight[0, 0].numel()
        assert sub.weight.std().item() == pytest.approx(gain / fan_out**0.5, rel=0.03)
        assert not sub.bias.any()
    for norm in conv.norms:
        assert torch.equal(norm.weight, torch.ones(256))
        assert not norm.bias.any()
    linear = OverparamLinear(200, 400, depth=3)
    for sub, gain in zip(linear.layers, (1, 1, 2**0.5), strict=True):
        expected = gain / sub.weight.shape[1] ** 0.5
        assert sub.weight.std().item() == pytest.approx(expected, rel=0.03)


def test_kernel_sizes_and_attributes() -> None:
    assert OverparamConv2d(2, 4, [5, 3, 1], padding=3, depth=3).kernel_size == (7, 7)
    assert OverparamConv2d(2, 4, 5, depth=3).kernel_sizes == ((5, 5), (1, 1), (1, 1))
    with pytest.warns(UserWarning, match=r"\(1, 4\) as one 1x4 kernel.*\[\(1, 4\), 1\].*\[1, 4\]"):
        assert OverparamConv2d(2, 4, (1, 4)).kernel_size == (1, 4)
    assert OverparamConv2d(2, 4).kernel_size == (3, 3)
    layer = OverparamConv2d(2, 4, [3, 1], width=2.6, stride=2)
    assert layer.layers[0].weight.shape == (10, 2, 3, 3)
    assert layer.layers[0].stride == (1, 1)
    assert layer.layers[-1].stride == (2, 2)
    plain = nn.Conv2d(2, 4, 3, 2, 1)
    x = torch.randn(1, 2, 9, 9)
    assert layer(x).shape == plain(x).shape
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
                 "groups", "padding_mode", "transposed", "output_padding"):  # fmt: skip
        assert getattr(layer, name) == getattr(plain, name)
    assert "kernel_sizes=[(3, 3), (1, 1)]" in repr(layer)


def test_attention_reads_the_weight() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.out_proj = OverparamLinear(8, 8, width=2)  # type: ignore[assignment]
    x = torch.randn(2, 5, 8)
    out = attention(x, x, x)[0]
    out.sum().backward()
    assert attention.out_proj.layers[0].weight.grad.abs().max() > 0  # type: ignore[union-attr]
    torch.testing.assert_close(attention.eval()(x, x, x)[0], out)


def test_an_unreached_interval_warns_and_adds_nothing() -> None:
    with pytest.warns(UserWarning, match=r"\[3\] are longer than its depth 2"):
        layer = OverparamConv2d(
            32, 32, 3, padding=1, depth=2, residual=True, residual_intervals=[1, 2, 3]
        )
    assert layer.chain.intervals == (1, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 0.2}, "width=0.2"),
        ({"width": 1.25, "groups": 2}, "groups=2"),
        ({"groups": 3}, "groups=3"),
        ({"kernel_sizes": [3, 1], "depth": 3}, "depth=3"),
        ({"kernel_sizes": 0}, "kernel_sizes=0"),
        ({"kernel_sizes": (3, 3, 3)}, r"\(3, 3, 3\)"),
        ({"kernel_sizes": "33"}, "kernel_sizes='33'"),
        ({"depth": 0}, "depth=0"),
        ({"kernel_sizes": []}, "depth 0"),
        ({"stride": 0}, "stride=0"),
        ({"padding": -1}, "padding=-1"),
        ({"padding": "full"}, "'full'"),
        ({"padding": "same", "stride": 2}, "'same'"),
        ({"padding_mode": "mirror"}, "'mirror'"),
        ({"residual": True, "residual_intervals": 0}, "interval of 0"),
        ({"residual": True, "residual_intervals": 1.5}, "residual_intervals=1.5"),
        ({"residual": True, "width": 2, "residual_intervals": 1}, "8 hidden channels and 4 in"),
        ({"residual": True, "out_channels": 8}, "4 channels in and 8 out"),
        ({"out_channels": 0}, "out_channels=0"),
        ({"width": True}, "width=True"),
        ({"stride": 1.5}, "stride=1.5"),
        ({"groups": True}, "groups=True"),
        ({"negative_slope": float("inf")}, "negative_slope=inf"),
    ],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        OverparamConv2d(**{"in_channels": 4, "out_channels": 4, **options})
    assert str(caught.value).startswith("OverparamConv2d")
    assert "\n" not in str(caught.value)


def test_bad_linear_options() -> None:
    with pytest.raises(ValueError, match=r"int\(4 \* 0.2\) = 0 hidden"):
        OverparamLinear(4, 4, width=0.2)
    with pytest.raises(ValueError, match="depth=0"):
        OverparamLinear(4, 4, depth=0)


def test_arguments_whose_order_differs_elsewhere_go_by_name_alone() -> None:
    """The authors' code and torch each have another sixth (fifth) positional argument."""
    with pytest.raises(TypeError, match="positional"):
        OverparamConv2d(4, 4, 3, 1, 1, 2)  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        OverparamLinear(4, 4, 1, 2, False)  # type: ignore[misc]
    with pytest.raises(ValueError, match="width=True"):
        OverparamLinear(4, 4, True)  # nn.Linear's bias
    assert OverparamConv2d(4, 4, [3, 1], 2, 0).stride == (2, 2)
    assert OverparamLinear(4, 6, 2, 3).chain.channels == (4, 12, 12, 6)


def test_a_tuple_of_kernels_is_said_to_be_one_kernel() -> None:
    with pytest.warns(UserWarning, match=r"\(3, 1\) as one 3x1 kernel, and not as a chain of 2"):
        layer = OverparamConv2d(2, 4, (3, 1))
    assert layer.kernel_sizes == ((3, 1), (1, 1))
    chain = OverparamConv2d(2, 4, np.array([5, 3]))  # type: ignore[arg-type]
    assert chain.kernel_sizes == ((5, 5), (3, 3))


def test_numbers_of_numpy_serve_everywhere() -> None:
    one, two, three = (np.int64(n) for n in (1, 2, 3))
    layer = OverparamConv2d(
        two, two, [three, one], one, one, dilation=one, groups=two, width=np.float64(1),
        residual=True, residual_intervals=two,
    )  # fmt: skip
    pairs = OverparamConv2d(two, two, three, (one, two), (one, two), dilation=(one, one), depth=two)
    linear = OverparamLinear(two, two, one, three, residual=True, residual_intervals=[one, three])
    for made in (layer, pairs, linear):
        assert type(made.depth) is int
        assert "int64" not in repr(made)
        made.eval().collapse()
    assert layer.kernel_size == (3, 3)
    assert pairs.stride == pairs.padding == (1, 2)
    assert linear.chain.intervals == (1, 3)
    assert not isinstance(layer.padding[0], np.integer)


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_the_gain_follows_the_negative_slope(slope: float) -> None:
    torch.manual_seed(0)
    gain = (2 / (1 + slope**2)) ** 0.5
    for layer in (
        OverparamLinear(300, 300, negative_slope=slope),
        OverparamConv2d(100, 100, [3, 1], negative_slope=slope),
    ):
        first, last = layer.layers
        assert first.weight.std().item() == pytest.approx(first.weight[0].numel() ** -0.5, rel=0.03)
        assert last.weight.std().item() == pytest.approx(
            gain * last.weight[0].numel() ** -0.5, rel=0.03
        )


def test_a_choice_of_initialisation() -> None:
    torch.manual_seed(0)
    layer = OverparamConv2d(40, 80, [3, 1], negative_slope=0.5)
    layer.reset_parameters(mode="fan_in", b_init="default")
    for sub in layer.layers:
        fan_in = sub.weight[0].numel()
        bound = fan_in**-0.5
        assert 0.8 * bound < sub.bias.abs().max() <= bound
        gain = 1 if sub is layer.layers[0] else (2 / 1.25) ** 0.5
        assert sub.weight.std().item() == pytest.approx(gain * bound, rel=0.05)
    layer.reset_parameters(nn.init.xavier_normal_)
    for sub, gain in zip(layer.layers, (1, (2 / 1.25) ** 0.5), strict=True):
        fans = (sub.in_channels + sub.out_channels) * sub.weight[0, 0].numel()
        assert sub.weight.std().item() == pytest.approx(gain * (2 / fans) ** 0.5, rel=0.05)
        assert not sub.bias.any()
    layer.reset_parameters(nn.init.zeros_)
    assert not layer.weight.any()
    linear = OverparamLinear(8, 8)
    linear.reset_parameters(nn.init.orthogonal_)
    first = linear.layers[0].weight
    torch.testing.assert_close(first @ first.T, torch.eye(8))
    with pytest.raises(ValueError, match="b_init='one'"):
        linear.reset_parameters(b_init="one")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode='fan_avg'"):
        linear.reset_parameters(mode="fan_avg")  # type: ignore[arg-type]


def test_same_padding_keeps_the_size() -> None:
    x = torch.randn(1, 2, 11, 12)
    helper = OverparamConv2d.compute_same_padding
    cases: list[tuple[Any, Any, Any]] = [
        ([5, 3, 1], 1, 3), (3, 1, 1), ([3, 3], 2, 4), ([2, 2], 1, 1), ([(1, 3), 3], 1, (1, 2)),
        ([3, 1], (1, 2), (1, 2)), (1, 1, 0),
    ]  # fmt: skip
    for kernels, dilation, wanted in cases:
        assert helper(kernels, dilation) == wanted
        layer = OverparamConv2d(2, 2, kernels, padding=wanted, dilation=dilation)
        assert layer(x).shape == x.shape
    with pytest.raises(ValueError, match=r"\[2, 1\], an even kernel"):
        helper([2, 1])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding", [0, 1, (2, 1), "same"])
@pytest.mark.parametrize("intervals", [1, 2, -1, [1, 2, 3]])
def test_branches_over_even_kernels_are_exact(padding: Any, intervals: Any) -> None:
    torch.manual_seed(0)
    for stride, dilation in ((1, 1), (1, 2), (2, 1), ((3, 2), 2)):
        if padding == "same" and stride != 1:
            continue
        layer = OverparamConv2d(
            4, 4, [2, (3, 4), 2], stride, padding, dilation=dilation, groups=2, residual=True,
            residual_intervals=intervals, dtype=torch.float64,
        )  # fmt: skip
        unsettle(layer)
        layer.eval()
        x = torch.randn(1, 4, 13, 14, dtype=torch.float64)
        torch.testing.assert_close(layer(x), by_hand(layer, x), **EXACT)
        torch.testing.assert_close(layer.forward_expanded(x), by_hand(layer, x), **EXACT)
    shifted = OverparamConv2d(
        1, 1, [2], 1, "same", bias=False, residual=True, residual_intervals=1, dtype=torch.float64
    )
    nn.init.zeros_(shifted.layers[0].weight)
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(shifted(x), x, **EXACT)  # aligned with what "same" pads
