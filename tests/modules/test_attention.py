"""Unpacked attention against torch's and torchvision's own, option by option."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.errors import ModelError, UnsupportedLayer
from compress.modules.attention import (
    UnpackedAttention,
    UnpackedEncoder,
    UnpackedEncoderLayer,
    UnpackedWindowAttention,
    attention_names,
    reads_child_weights,
    unpack,
)
from compress.vision.torchvision import torchvision_model

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter, biases too, so that nothing is equal by being zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.5 / math.sqrt(parameter.shape[-1])
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module.double().eval()


def all_unpacked(model: nn.Module) -> tuple[str, ...]:
    """Unpack whatever can be, in place; return the names."""
    names = attention_names(model)
    assert unpack(model, names) is model
    return names


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def masked(*shape: int, kind: str, seed: int = 2) -> torch.Tensor | None:
    """Make a mask that always leaves the first key visible."""
    if kind == "none":
        return None
    hidden = normal(*shape, seed=seed) > 0.3
    hidden[..., 0] = False
    if kind == "bool":
        return hidden
    return normal(*shape, seed=seed + 1).masked_fill(hidden, -math.inf)


@settings(derandomize=True, deadline=None, max_examples=120)
@given(data=st.data())
def test_attention_equals_torch(data: Any) -> None:
    flag = st.booleans()
    draw = data.draw
    batch_first, batched, fast = draw(flag), draw(flag), draw(flag)
    kdim, vdim = draw(st.sampled_from([(None, None), (None, None), (6, 10)]))
    relation = draw(st.sampled_from(["self", "memory", "apart"])) if kdim is None else "apart"
    heads = draw(st.sampled_from([2, 4]))
    module = nn.MultiheadAttention(
        8,
        heads,
        bias=draw(flag),
        add_bias_kv=draw(flag),
        add_zero_attn=draw(flag),
        kdim=kdim,
        vdim=vdim,
        batch_first=batch_first,
        dropout=0.3,
    )
    module = randomised(module)
    unpacked = UnpackedAttention.from_module(module, packed=draw(flag))
    length, batch = 5, 3
    keys = length if relation == "self" else 4

    def sequence(size: int, width: int, seed: int) -> torch.Tensor:
        lead = (size,) if not batched else (batch, size) if batch_first else (size, batch)
        return normal(*lead, width, seed=seed)

    query = sequence(length, 8, 1)
    key = query if relation == "self" else sequence(keys, kdim or 8, 2)
    value = sequence(keys, vdim or 8, 3) if relation == "apart" else key
    kind = draw(st.sampled_from(["bool", "float"]))
    per_head = (batch if batched else 1) * heads
    shape = draw(st.sampled_from([(length, keys), (per_head, length, keys)]))
    options = {
        "attn_mask": masked(*shape, kind=draw(st.sampled_from(["none", kind]))),
        "key_padding_mask": masked(
            *((batch, keys) if batched else (keys,)), kind=draw(st.sampled_from(["none", kind]))
        ),
        "need_weights": draw(flag),
        "average_attn_weights": draw(flag),
    }
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.inference_mode(fast):
            expected = module(query, key, value, **options)
            actual = unpacked(query, key, value, **options)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    torch.testing.assert_close(actual[0], expected[0], **EXACT)
    assert (actual[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(actual[1], expected[1], **EXACT)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padding", [True, False])
def test_causal_hint_equals_torch(need_weights: Any, padding: Any) -> None:
    module = randomised(nn.MultiheadAttention(8, 2, batch_first=True))
    x = normal(3, 5, 8)
    options = {
        "attn_mask": torch.ones(5, 5).triu(1).bool(),
        "is_causal": True,
        "need_weights": need_weights,
        "key_padding_mask": masked(3, 5, kind="bool") if padding else None,
    }
    actual = UnpackedAttention.from_module(module)(x, x, x, **options)
    expected = module(x, x, x, **options)
    torch.testing.assert_close(actual[0], expected[0], **EXACT)
    without_hint = module(x, x, x, **{**options, "is_causal": False})
    torch.testing.assert_close(actual[0], without_hint[0], **EXACT)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_query_that_sees_nothing_equals_torch(need_weights: Any) -> None:
    module = randomised(nn.MultiheadAttention(8, 2))
    x = normal(4, 2, 8)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1] = True
    options = {"attn_mask": mask, "need_weights": need_weights}
    actual = UnpackedAttention.from_module(module)(x, x, x, **options)[0]
    torch.testing.assert_close(actual, module(x, x, x, **options)[0], equal_nan=True, **EXACT)


def test_masks_of_different_types_add_up() -> None:
    attention = UnpackedAttention.from_module(randomised(nn.MultiheadAttention(8, 2)))
    x = normal(4, 2, 8)
    hidden = torch.tensor([[False, False, True, False], [False, True, False, False]])
    as_float = torch.zeros(2, 4, dtype=torch.float64).masked_fill(hidden, -math.inf)
    bias = normal(4, 4, seed=9)
    torch.testing.assert_close(
        attention(x, x, x, attn_mask=bias, key_padding_mask=hidden)[0],
        attention(x, x, x, attn_mask=bias, key_padding_mask=as_float)[0],
    )


def test_what_attention_refuses() -> None:
    attention = UnpackedAttention.from_module(randomised(nn.MultiheadAttention(8, 2)))
    x = normal(4, 2, 8)
    with pytest.raises(ValueError, match="pass the mask"):
        attention(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="boolean or floating"):
        attention(x, x, x, attn_mask=torch.zeros(4, 4, dtype=torch.long))
    with pytest.warns(UserWarning, match="nested tensors"):
        nested = torch.nested.nested_tensor([normal(3, 8), normal(2, 8)])
    with pytest.raises(ValueError, match="nested"):
        attention(nested, nested, nested)


def test_parameters_are_shared_and_the_original_is_left_as_it_was() -> None:
    module = randomised(nn.MultiheadAttention(8, 2, add_bias_kv=True))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.in_proj_weight.requires_grad_(False)
    attention = UnpackedAttention.from_module(module.train())
    assert attention.in_proj.weight is module.in_proj_weight
    assert attention.out_proj.weight is module.out_proj.weight
    assert attention.bias_k is module.bias_k
    assert attention.training
    assert type(attention.in_proj) is type(attention.out_proj) is nn.Linear
    apart = UnpackedAttention.from_module(module, packed=False)
    assert not apart.q_proj.weight.requires_grad
    assert apart.q_proj.bias.requires_grad
    assert module.state_dict().keys() == before.keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_acts_in_training_alone(need_weights: Any) -> None:
    module = randomised(nn.MultiheadAttention(8, 2, dropout=1.0))
    attention = UnpackedAttention.from_module(module)
    x = normal(4, 2, 8)
    nothing_attended = attention.out_proj.bias.expand(4, 2, 8)
    assert not torch.allclose(attention(x, x, x)[0], nothing_attended)
    attention.train()
    actual = attention(x, x, x, need_weights=need_weights)[0]
    torch.testing.assert_close(actual, nothing_attended, **EXACT)


class Called:
    """Counts the calls of modules."""

    def __init__(self, *modules: nn.Module) -> None:
        self.rows = [0] * len(modules)
        for index, module in enumerate(modules):
            module.register_forward_hook(self._hook(index))

    def _hook(self, index: Any) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            self.rows[index] += output[..., 0].numel()

        return hook


def test_self_attention_projects_once_and_crossing_as_often_as_needed() -> None:
    x, memory, other = normal(4, 2, 8), normal(3, 2, 8, seed=5), normal(3, 2, 8, seed=6)
    for inputs, rows in (((x, x, x), 8), ((x, memory, memory), 8 + 6), ((x, memory, other), 20)):
        attention = UnpackedAttention.from_module(randomised(nn.MultiheadAttention(8, 2)))
        called = Called(attention.in_proj, attention.out_proj)
        attention(*inputs)
        assert called.rows == [rows, 8]


def chain(linear: nn.Linear) -> nn.Sequential:
    """Factorise a linear layer at full rank."""
    u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    first = nn.Linear(linear.in_features, len(s), bias=False, dtype=linear.weight.dtype)
    last = nn.Linear(len(s), linear.out_features, linear.bias is not None, dtype=u.dtype)
    with torch.no_grad():
        first.weight.copy_(s[:, None] * v)
        last.weight.copy_(u)
        if linear.bias is not None:
            last.bias.copy_(linear.bias)
    return nn.Sequential(first, last)


def replace_linears(model: nn.Module) -> int:
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and not isinstance(parent, nn.Sequential):
                setattr(parent, name, chain(child))
                count += 1
    return count


ENCODER = [
    pytest.param(norm_first, activation, batch_first, id=f"{norm_first}-{name}-{batch_first}")
    for norm_first, (name, activation), batch_first in itertools.product(
        [True, False],
        [("relu", "relu"), ("gelu", F.gelu), ("module", nn.SiLU())],
        [True, False],
    )
]


@pytest.mark.parametrize(("norm_first", "activation", "batch_first"), ENCODER)
def test_encoder_layer_equals_torch(norm_first: Any, activation: Any, batch_first: Any) -> None:
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, 0.1, activation, norm_first=norm_first, batch_first=batch_first
    )
    layer = randomised(layer)
    unpacked = UnpackedEncoderLayer.from_module(layer)
    x = normal(3, 3, 8)
    replaced = copy.deepcopy(unpacked)
    assert replace_linears(replaced) == 4
    for kind, mask, padding in itertools.product(("bool", "float"), (True, False), (True, False)):
        options = {
            "src_mask": masked(3, 3, kind=kind) if mask else None,
            "src_key_padding_mask": masked(3, 3, kind=kind) if padding else None,
        }
        # Without gradients torch takes its fused path, which gets floating masks wrong.
        with torch.set_grad_enabled(kind == "float"):
            expected = layer(x, **options)
            torch.testing.assert_close(unpacked(x, **options), expected, **EXACT)
            torch.testing.assert_close(replaced(x, **options), expected, **EXACT)


def encoder(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    made = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), **options)
    randomised(made)
    return made


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("lengths", [(4, 2, 1), (4, 4, 4), (3, 2, 1)])
def test_encoder_zeroes_padding_where_torch_does(grad: Any, lengths: Any) -> None:
    module = encoder()
    unpacked = UnpackedEncoder.from_module(module)
    x = normal(3, 4, 8)
    padding = torch.arange(4) >= torch.tensor(lengths)[:, None]
    with torch.set_grad_enabled(grad):
        expected = module(x, src_key_padding_mask=padding)
        actual = unpacked(x, src_key_padding_mask=padding)
    torch.testing.assert_close(actual, expected, **EXACT)
    if min(lengths) < 4:  # the two ways of torch differ there, so that the test can fail
        other = unpacked.norm(torch.zeros(8, dtype=torch.float64))
        assert torch.allclose(actual[-1, -1], other) == (not grad)


@pytest.mark.parametrize("enable_nested_tensor", [True, False])
def test_encoder_equals_torch_with_masks(enable_nested_tensor: Any) -> None:
    module = encoder(enable_nested_tensor=enable_nested_tensor)
    x = normal(3, 4, 8)
    causal = torch.ones(4, 4).triu(1).bool()
    scattered = masked(3, 4, kind="bool")
    cases = [
        {},
        {"mask": causal},
        {"mask": causal, "is_causal": True},
        {"src_key_padding_mask": scattered},
        {"mask": causal, "src_key_padding_mask": scattered},
    ]
    model = nn.ModuleDict({"encoder": copy.deepcopy(module)})
    names = all_unpacked(model)
    inside = ("encoder.layers.0", "encoder.layers.1")
    assert names == (("encoder",) if enable_nested_tensor else inside)
    with torch.inference_mode():
        for options in cases:
            actual = model["encoder"](x, **options)
            torch.testing.assert_close(actual, module(x, **options), **EXACT)


def test_whole_transformer_equals_torch() -> None:
    module = randomised(nn.Transformer(8, 2, 2, 2, 16, batch_first=True))
    model = nn.Sequential(copy.deepcopy(module))
    assert all_unpacked(model) == (
        "0.encoder",
        "0.decoder.layers.0.self_attn",
        "0.decoder.layers.0.multihead_attn",
        "0.decoder.layers.1.self_attn",
        "0.decoder.layers.1.multihead_attn",
    )
    layer = model[0].decoder.layers[0]
    assert hasattr(layer.self_attn, "in_proj")
    assert hasattr(layer.multihead_attn, "k_proj")
    assert replace_linears(model) == 2 * 4 + 2 * (2 + 4 + 2)
    source, target = normal(3, 5, 8), normal(3, 4, 8, seed=8)
    options = {
        "tgt_mask": torch.ones(4, 4).triu(1).bool(),
        "src_key_padding_mask": torch.arange(5) >= torch.tensor([5, 4, 2])[:, None],
    }
    options["memory_key_padding_mask"] = options["src_key_padding_mask"]
    with torch.inference_mode():
        expected = module(source, target, **options)
        actual = model[0](source, target, **options)
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.fixture(scope="module")
def torchvision_models() -> Any:
    torchvision_model("resnet18")  # makes the import possible where operators are missing
    from torchvision import models

    return models


@pytest.mark.parametrize("version", ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((8, 8), (4, 4), (0, 0)),
        ((8, 8), (4, 4), (2, 2)),
        ((9, 7), (4, 3), (2, 1)),  # padded
        ((8, 3), (4, 4), (2, 2)),  # a single window across: shifted down alone
        ((8, 8), (4, 4), (0, 2)),
        ((2, 2), (4, 4), (2, 2)),
    ],
)
def test_window_attention_equals_torchvision(
    torchvision_models: Any, version: Any, size: Any, window: Any, shift: Any
) -> None:
    for heads, bias in ((2, True), (1, False)):
        module = getattr(torchvision_models.swin_transformer, version)(
            6, list(window), list(shift), heads, bias, bias, attention_dropout=0.2, dropout=0.2
        )
        module = randomised(module)
        unpacked = UnpackedWindowAttention.from_module(module)
        assert unpacked.state_dict().keys() == module.state_dict().keys()
        x = normal(2, *size, 6)
        torch.testing.assert_close(unpacked(x), module(x), **EXACT)
        replace_linears(unpacked)
        torch.testing.assert_close(unpacked(x), module(x), **EXACT)


def test_window_attention_drops_out_in_training_alone(torchvision_models: Any) -> None:
    kind = torchvision_models.swin_transformer.ShiftedWindowAttention
    module = randomised(kind(6, [2, 2], [1, 1], 2, attention_dropout=1.0))
    x = normal(1, 4, 4, 6)
    unpacked = UnpackedWindowAttention.from_module(module.train())
    torch.testing.assert_close(unpacked(x), module.proj.bias.expand(1, 4, 4, 6), **EXACT)
    unpacked.dropout = 1.0
    assert not unpacked(x).any()
    assert unpacked.eval()(x).all()


def check_network(model: nn.Module, side: int, count: int, names_like: str) -> None:
    """Unpack a network; outputs, tracing, projections and reloading must all hold."""
    x = normal(2, 3, side, side)
    original = copy.deepcopy(model)
    names = all_unpacked(model)
    assert len(names) == count
    assert all(names_like in name for name in names)
    with torch.inference_mode():
        expected = original(x)
        called = Called(*(m for m in model.modules() if type(m) is nn.Linear))
        torch.testing.assert_close(model(x), expected, **EXACT)
        assert all(called.rows)
        traced = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(traced(x), expected, **EXACT)
    assert all_unpacked(model) == ()
    unpack(original, names)
    assert original.state_dict().keys() == model.state_dict().keys()


def test_vit(torchvision_models: Any) -> None:
    model = torchvision_models.VisionTransformer(32, 8, 3, 4, 32, 64, num_classes=5)
    check_network(randomised(model), 32, 3, "self_attention")


@pytest.mark.parametrize("version", ["", "V2"])
def test_swin(torchvision_models: Any, version: Any) -> None:
    swin = torchvision_models.swin_transformer
    model = swin.SwinTransformer(
        [4, 4],
        24,
        [2, 2],
        [3, 6],
        [7, 7],
        num_classes=5,
        block=getattr(swin, f"SwinTransformerBlock{version}"),
        downsample_layer=getattr(swin, f"PatchMerging{version}"),
    )
    check_network(randomised(model), 64, 4, ".attn")


def test_a_saved_state_loads_into_a_fresh_model_unpacked_by_name() -> None:
    def build(seed: int) -> nn.Module:
        layer = nn.TransformerDecoderLayer(8, 2, 16)
        return randomised(nn.Sequential(encoder(), nn.MultiheadAttention(8, 2), layer), seed)

    model = build(0)
    names = all_unpacked(model)
    fresh = unpack(build(1), names)
    fresh.load_state_dict(model.state_dict(), strict=True)
    x = normal(3, 4, 8)
    torch.testing.assert_close(fresh[2](x, x), model[2](x, x), rtol=0, atol=0)


class Widened(nn.MultiheadAttention):
    """A subclass, which may compute anything."""


class Reordered(nn.TransformerEncoderLayer):
    """A subclass whose inherited forward reads the weights of an attention of known type."""


def test_subclasses_and_modules_with_hooks_are_left_alone() -> None:
    hooked = nn.MultiheadAttention(8, 2)
    hooked.register_forward_hook(lambda *_: None)
    hooked_inside = nn.MultiheadAttention(8, 2)
    hooked_inside.out_proj.register_forward_pre_hook(lambda *_: None)
    odd = nn.MultiheadAttention(8, 2)
    odd.out_proj = nn.Identity()
    nested = nn.TransformerEncoder(Reordered(8, 2, 16, batch_first=True), 1)
    plain = nn.MultiheadAttention(8, 2)
    model = nn.Sequential(Widened(8, 2), Reordered(8, 2), hooked, hooked_inside, odd, nested, plain)
    before = list(model.children())[:-1]
    assert all_unpacked(model) == ("6",)
    assert list(model.children())[:-1] == before
    assert type(model[1].self_attn) is nn.MultiheadAttention
    with pytest.raises(UnsupportedLayer, match="Widened has no unpacked equal"):
        UnpackedAttention.from_module(model[0])
    with pytest.raises(UnsupportedLayer, match="hooks are attached to out_proj"):
        UnpackedAttention.from_module(hooked_inside)
    with pytest.raises(UnsupportedLayer, match="its out_proj is a Identity"):
        UnpackedAttention.from_module(odd)
    with pytest.raises(UnsupportedLayer, match="exactly"):
        UnpackedEncoder.from_module(nested)
    with pytest.raises(UnsupportedLayer, match="Swin"):
        UnpackedWindowAttention.from_module(plain)


def test_shared_modules_stay_shared() -> None:
    attention = nn.MultiheadAttention(8, 2)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    stack = nn.TransformerEncoder(layer, 1)
    stack.layers.append(stack.layers[0])
    model = nn.ModuleDict(
        {"a": attention, "b": nn.Sequential(attention), "c": attention, "stack": stack}
    )
    assert all_unpacked(model) == ("a", "stack")
    assert type(model["a"]) is UnpackedAttention
    assert model["a"] is model["b"][0] is model["c"]
    assert model["stack"].layers[0] is model["stack"].layers[1]


def test_a_root_is_returned_and_left_as_it_is() -> None:
    module = randomised(nn.MultiheadAttention(8, 2))
    assert attention_names(module) == ("",)
    new = unpack(module, attention_names(module))
    x = normal(4, 2, 8)
    torch.testing.assert_close(new(x, x, x)[0], module(x, x, x)[0], **EXACT)
    assert unpack(new, ()) is new


def test_names_that_do_not_fit_the_model() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "linear": nn.Linear(2, 2)})
    with pytest.raises(ModelError, match="Did you mean 'attention'"):
        unpack(model, ["attentoin"])
    with pytest.raises(ModelError, match=r"'linear' cannot be unpacked: Linear has no"):
        unpack(model, ["linear"])


def test_who_reads_child_weights(torchvision_models: Any) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    read = ("self_attn.out_proj", "linear1", "linear2")
    assert reads_child_weights(layer) == read
    assert reads_child_weights(nn.TransformerEncoder(layer, 1)) == tuple(
        f"layers.0.{name}" for name in read
    )
    assert reads_child_weights(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)) == ()
    assert reads_child_weights(Widened(8, 2)) == ("out_proj",)
    swin = torchvision_models.swin_transformer
    window = swin.ShiftedWindowAttentionV2(6, [2, 2], [0, 0], 2)
    assert reads_child_weights(window) == ("qkv", "proj")
    video = torchvision_models.video.swin_transformer.ShiftedWindowAttention3d(
        6, [2, 2, 2], [0, 0, 0], 2
    )
    assert reads_child_weights(video) == ("qkv", "proj")
    assert attention_names(nn.Sequential(video)) == ()
    unpacked = UnpackedWindowAttention.from_module(window)
    for other in (unpacked, nn.Linear(2, 2), nn.TransformerDecoderLayer(8, 2), nn.Sequential()):
        assert reads_child_weights(other) == ()
