"""What is made plain before anything else: the output stays, and nothing else is believed."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks.special import (
    LowRankUpdate,
    SamePadding,
    Scaled,
    Standardised,
    StandardisedSame,
    StaticPadding,
    parametrised,
    special,
)
from stopwatch import stop_the_clock
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import compress
from compress.artefact.model import load, save
from compress.errors import ArtefactError
from compress.network.baking import PlainLayer, bake_weights, copied, put_plain
from compress.network.baseline import prepare
from compress.network.proving import Unproved, base_of, prove

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
EXAMPLE = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("make", [special, parametrised])
def test_the_baseline_gives_the_same_of_plain_layers_alone(make: Any) -> None:
    model = make()
    before, kinds = state_of(model), [type(m) for m in model.modules()]
    network = prepare(model, EXAMPLE)
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(network.model(x), model(x), **CLOSE)
    assert all(site.skip is None or "rank 1" in site.skip for site in network.sites)
    assert network.graph is not None
    assert [pair.norm for pair in network.folded] == ["norm"]
    for name, module in network.model.named_modules():
        assert not name or type(module).__module__.startswith("torch.nn.modules"), name
        assert not module._forward_pre_hooks
    # The user's model is what it was, class by class and bit by bit.
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_is_recorded_what_was_made_plain() -> None:
    network = prepare(special(), EXAMPLE)
    assert network.baked.weights == ()
    padding = {layer.name: layer.padding for layer in network.baked.layers}
    assert padding == {
        "stem": ((0, 1), (0, 1)), "same": ((0, 1), (0, 1)), "standard": (),
        "both": ((0, 1), (0, 1)), "scaled": (), "head": (),
    }  # fmt: skip
    assert network.baked.fixed == ("same",)
    assert any("padding of same depends" in w and "8x8" in w for w in network.warnings)
    network = prepare(parametrised(), EXAMPLE)
    assert network.baked.weights == ("first", "second", "third", "fourth", "fifth", "head")
    assert network.baked.layers == ()


@pytest.mark.parametrize("make", [special, parametrised])
def test_results_are_saved_and_loaded(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_the_clock(monkeypatch)
    images = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    made = compress.compress_model(
        make(), (images, torch.arange(24) % 3), spec="", rank={"*": "2"}, force_rank=True,
        metric="mse",
    )  # fmt: skip
    file = tmp_path / "model.safetensors"
    save(made.model, made.manifest, file)
    loaded = load(file, model=make())
    own, found = made.model.state_dict(), loaded.state_dict()
    assert own.keys() == found.keys()
    assert all(torch.equal(own[name], found[name]) for name in own)
    with torch.no_grad():
        assert torch.equal(loaded(images), made.model(images))
    with pytest.raises(ArtefactError, match="does not fit"):
        load(file, model=nn.Sequential(nn.Conv2d(1, 4, 3)))


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "static": (StaticPadding(3, 5, 3, 2, 9), (1, 3, 9, 9)),
    "static, stride 1": (StaticPadding(3, 5, 5, 1, 9), (1, 3, 9, 9)),
    "same, even size": (SamePadding(3, 5, 3, 2), (1, 3, 8, 8)),
    "same, odd size": (SamePadding(3, 5, 3, 2), (1, 3, 9, 7)),
    "same, groups": (SamePadding(4, 6, (3, 5), (2, 1), dilation=2, groups=2), (1, 4, 11, 10)),
    "standardised": (Standardised(3, 5, 3, 2, padding="valid"), (1, 3, 9, 8)),
    "standardised, reflect": (
        Standardised(3, 5, 3, padding=1, padding_mode="reflect"), (1, 3, 9, 8),
    ),
    "standardised same": (StandardisedSame(4, 6, 4, 3, bias=False), (1, 4, 9, 8)),
    "scaled": (Scaled(3, 5, 3, padding=1), (1, 3, 9, 8)),
    "low-rank update": (LowRankUpdate(6, 5), (1, 7, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_proved_layers_are_what_they_stand_for(name: str) -> None:
    """Of the size that they were proved for, for any number of inputs."""
    layer, shape = copy.deepcopy(LAYERS[name][0]).eval(), LAYERS[name][1]
    found = prove(layer, [shape])
    x = torch.randn(4, *shape[1:])
    with torch.no_grad():
        torch.testing.assert_close(found.module(x), layer(x), **CLOSE)
    again = put_plain(layer, [PlainLayer("", found.padding)])
    assert repr(again) == repr(found.module)
    again.load_state_dict(found.module.state_dict())
    assert found.fixed == (name.startswith("same") or name == "standardised same")


class OneDimensional(nn.Conv1d):
    """Looks at what was before alone, by padding on one side."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, ((self.kernel_size[0] - 1) * self.dilation[0], 0))
        return F.conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class CausalInTime(nn.Conv3d):
    """Pads the past alone, and height and width on both sides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 0, 0, 0, self.kernel_size[0] - 1, 0)))


def test_three_dimensions_are_padded_apart() -> None:
    layer = CausalInTime(2, 4, (3, 2, 3), padding=(0, 1, 1)).eval()
    found = prove(layer, [(1, 2, 5, 6, 7)])
    assert found.padding == ((2, 0), (1, 1), (1, 1))
    x = torch.randn(2, 2, 4, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(found.module(x), layer(x), **CLOSE)


def test_causal_convolutions_are_a_padding_and_a_convolution() -> None:
    layer = OneDimensional(3, 4, 3, dilation=2).eval()
    found = prove(layer, [(1, 3, 11)])
    assert not found.fixed
    assert [type(m) for m in found.module] == [nn.ZeroPad1d, nn.Conv1d]  # type: ignore[attr-defined]
    x = torch.randn(2, 3, 17)
    with torch.no_grad():
        torch.testing.assert_close(found.module(x), layer(x), **CLOSE)


class Clipped(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-6, 6))


class Noisy(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.01 * torch.randn(())


class OwnNorm(nn.Conv2d):
    """A weight that depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * (1 + x.mean().tanh()), self.bias)


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class OnesAround(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1), value=1.0))


class Shifted(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


class WidePadding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (3, 3, 3, 3)))


class SizeDependent(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.shape[-1]


class Refusing(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 9:
            raise SystemExit("nine alone")
        return super().forward(x)


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Clipped, "something else"),
        (Noisy, "something else"),
        (OwnNorm, "something else"),
        (Twice, "2 convolutions"),
        (OnesAround, "something else"),
        (WidePadding, "pads by"),
        (SizeDependent, "something else"),
        (Refusing, "nine alone"),
    ],
)
def test_what_computes_something_else_is_not_proved(kind: Any, reason: str) -> None:
    layer = kind(3, 3, 3, padding=1).eval()
    with pytest.raises(Unproved, match=reason):
        prove(layer, [(1, 3, 9, 9)])
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(1, 3, 9, 9)
    model(x)
    site = prepare(model, x).site("0")
    assert site.skip is not None
    assert f"a subclass of Conv2d ({kind.__name__}) that is kept: " in site.skip
    assert reason in site.skip


def test_activations_and_constants_are_seen() -> None:
    with pytest.raises(Unproved, match="something else"):
        prove(Activated(4, 3), [(2, 4)])
    with pytest.raises(Unproved, match="something else"):
        prove(Shifted(3, 4, 3, bias=False), [(1, 3, 9, 9)])
    shifted = Shifted(3, 4, 3)
    found = prove(shifted, [(1, 3, 9, 9)])  # the bias takes it in
    torch.testing.assert_close(found.module.bias, shifted.bias + 1.0)


def test_a_layer_that_pads_in_two_ways_in_one_forward_is_kept() -> None:
    with pytest.raises(Unproved, match="differs between its calls"):
        prove(SamePadding(3, 3, 3, 2), [(1, 3, 8, 8), (1, 3, 9, 9)])
    assert prove(SamePadding(3, 3, 3, 1), [(1, 3, 8, 8), (1, 3, 9, 9)]).padding


class Peeking(nn.Module):
    """Takes one of its layers for what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.peeked, self.called = SamePadding(1, 4, 3, 2), SamePadding(4, 4, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.peeked, SamePadding)
        return self.called(self.peeked(x)).mean((2, 3))


def test_a_layer_that_its_model_looks_at_is_kept_and_others_are_not() -> None:
    network = prepare(Peeking(), EXAMPLE)
    assert [layer.name for layer in network.baked.layers] == ["called"]
    reason = network.site("peeked").skip
    assert reason is not None
    assert "the model does more than call it" in reason


def test_a_shared_subclass_is_replaced_wherever_it_stands() -> None:
    shared = SamePadding(1, 1, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared).eval()
    network = prepare(model, EXAMPLE)
    assert network.model[0] is network.model[2]  # type: ignore[index]
    with torch.no_grad():
        torch.testing.assert_close(network.model(EXAMPLE), model(EXAMPLE), **CLOSE)


def test_the_model_may_itself_be_the_subclass() -> None:
    network = prepare(Standardised(1, 4, 3).eval(), EXAMPLE)
    assert type(network.model) is nn.Conv2d
    assert network.site("").skip is None


class Drifting(nn.Module):
    """A parametrisation that is another in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(())


def test_a_parametrisation_without_one_value_stays() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Drifting())
    parametrizations.weight_norm(model[1])
    network = prepare(model.eval(), EXAMPLE)
    assert network.baked.weights == ("1",)
    assert "subclass of Conv2d" in str(network.site("0").skip)


def test_tied_originals_are_not_written_to() -> None:
    """A parametrised weight that is another layer's plain one."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    parametrizations.weight_norm(model[1])
    model[1].parametrizations.weight.original1 = model[0].weight
    model = nn.Sequential(nn.Flatten(), model).eval()
    with torch.no_grad():
        model[1][1].parametrizations.weight.original0.mul_(2)
        expected = model(EXAMPLE)
        torch.testing.assert_close(prepare(model, EXAMPLE).model(EXAMPLE), expected, **CLOSE)


def test_weights_of_recurrent_layers_are_baked() -> None:
    model = nn.LSTM(8, 8, batch_first=True)
    nn.utils.weight_norm(model, "weight_hh_l0")
    x = torch.randn(1, 5, 8)
    with torch.no_grad():
        expected = model.eval()(x)[0]
        network = prepare(model, x)
        assert network.baked.weights == ("",)
        torch.testing.assert_close(network.model(x)[0], expected, **CLOSE)


def test_models_with_old_norms_are_copied_after_a_forward() -> None:
    model = nn.utils.weight_norm(nn.Conv2d(1, 4, 3))
    model(EXAMPLE)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    graph = model.weight.grad_fn
    assert torch.equal(copied(model)(EXAMPLE), model(EXAMPLE))
    assert graph is not None


def test_records_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no parametrised weight"):
        bake_weights(special(), ["stem"])
    with pytest.raises(ValueError, match="is no subclass"):
        put_plain(special(), [PlainLayer("norm")])
    for padding in (((0, 3), (0, 0)), ((0, 1),), ((0, 10**9), (0, 0))):
        with pytest.raises(ValueError, match="pads by"):
            put_plain(special(), [PlainLayer("stem", padding)])
    with pytest.raises(ValueError, match="pads by"):
        put_plain(special(), [PlainLayer("head", ((0, 0), (0, 0)))])


def test_bases_of_subclasses_alone() -> None:
    assert base_of(nn.Conv2d(1, 1, 1)) is None
    assert base_of(nn.ReLU()) is None
    found = base_of(SamePadding(1, 1, 1))
    assert found is not None
    assert found.name == "Conv2d"


def test_a_proof_takes_no_gradients_and_leaves_the_random_state() -> None:
    layer = Scaled(3, 4, 3).train()
    state = torch.get_rng_state()
    found = prove(layer, [(1, 3, 9, 9)])
    assert layer.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.is_leaf and p.requires_grad for p in found.module.parameters())
    assert math.isclose(float(sum(p.abs().sum() for p in layer.parameters() if p.grad)), 0.0)
