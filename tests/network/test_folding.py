"""Folding BatchNorm: exact where it is done, and done only where it is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.network.baseline import prepare
from compress.network.folding import FoldedPair, fold_batch_norms
from compress.network.tracing import trace
from compress.running.forward import same_outputs
from compress.running.modules import replace_module

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def random_norm(norm: nn.Module) -> nn.Module:
    """Statistics and affine parameters that are not the identity."""
    with torch.no_grad():
        if norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        if norm.weight is not None:
            norm.weight.uniform_(-2, 2)
            norm.bias.normal_()
    return norm


class Pair(nn.Module):
    """A layer and a norm, joined by a forward of its own that can be traced or not."""

    def __init__(self, layer: nn.Module, norm: nn.Module, traceable: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(layer, norm, nn.ReLU())
        self.traceable = traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            return x
        return self.body(x)


def fold(model: nn.Module, x: Tensor) -> tuple[FoldedPair, ...]:
    return fold_batch_norms(model, trace(model, x[:1]))


def ready(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            random_norm(module)
    return model.double().eval()


FOLDING: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(3, 6, 3), lambda: nn.BatchNorm2d(6), (3, 7, 8)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), (4, 7, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), lambda: nn.BatchNorm2d(4), (4, 7, 8)),
    "eps": (lambda: nn.Conv2d(3, 6, 3), lambda: nn.BatchNorm2d(6, eps=0.37), (3, 7, 8)),
    "not-affine": (
        lambda: nn.Conv2d(3, 6, 3, bias=False), lambda: nn.BatchNorm2d(6, affine=False), (3, 7, 8),
    ),
    "padded": (
        lambda: nn.Conv2d(3, 6, 3, padding=1, bias=False, padding_mode="reflect"),
        lambda: nn.BatchNorm2d(6), (3, 7, 8),
    ),
    "conv1d": (lambda: nn.Conv1d(3, 6, 3), lambda: nn.BatchNorm1d(6), (3, 9)),
    "conv3d": (lambda: nn.Conv3d(3, 6, 2), lambda: nn.BatchNorm3d(6), (3, 4, 5, 4)),
    "up3d": (
        lambda: nn.ConvTranspose3d(4, 6, 2, 2, groups=2), lambda: nn.BatchNorm3d(6), (4, 3, 3, 3)
    ),
    "up": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False),
        lambda: nn.BatchNorm2d(6, eps=0.1), (4, 5, 6),
    ),
    "up1d": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), lambda: nn.BatchNorm1d(6), (4, 7)),
}  # fmt: skip


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("name", FOLDING)
def test_folding_is_exact(name: str, traceable: bool) -> None:
    layer, norm, shape = FOLDING[name]
    model = ready(Pair(layer(), norm(), traceable))
    x = torch.randn(2, *shape, dtype=torch.float64)
    assert (trace(model, x[:1]) is not None) == traceable
    before = model(x)
    assert fold(model, x) == (FoldedPair("body.0", "body.1"),)
    assert type(model.body[1]) is nn.Identity
    assert model.body[0].bias is not None
    torch.testing.assert_close(model(x), before, **EXACT)
    assert fold(model, x) == ()


def test_frozen_layers_stay_frozen_and_dtypes_stay() -> None:
    model = ready(Pair(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6))).to(torch.bfloat16)
    model.body[0].weight.requires_grad_(False)
    assert fold(model, torch.zeros(1, 3, 7, 7, dtype=torch.bfloat16))
    assert not model.body[0].weight.requires_grad
    assert not model.body[0].bias.requires_grad
    assert model.body[0].weight.dtype == model.body[0].bias.dtype == torch.bfloat16


class Branching(nn.Module):
    """Every way in which a norm's input is not the convolution's output and nothing else's."""

    def __init__(self) -> None:
        super().__init__()
        self.used_twice, self.norm1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.between, self.norm2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.shared, self.norm3 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.layer4, self.shared_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.read, self.norm5 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.norm6, self.after = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.good, self.norm7 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.used_twice(x)
        x = self.norm1(y) + y
        x = self.norm2(self.between(x).relu())
        x = self.norm3(self.shared(x)) + self.shared(x)
        x = self.shared_norm(self.layer4(x)) + self.shared_norm(x)
        x = self.norm5(self.read(x)) + F.conv2d(x, self.read.weight)
        x = self.after(self.norm6(x))
        return self.norm7(self.good(x))


def test_only_the_pair_that_stands_alone_is_folded() -> None:
    model = ready(Branching())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    before = model(x)
    assert fold(model, x) == (FoldedPair("good", "norm7"),)
    torch.testing.assert_close(model(x), before, **EXACT)


class Scaled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Odd(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def tied() -> Pair:
    model = Pair(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model.body.append(nn.Conv2d(3, 3, 1))
    model.body[3].weight = model.body[0].weight
    return model


def hooked(where: int, kind: str) -> Pair:
    model = Pair(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    register = getattr(model.body[where], f"register_forward_{kind}hook")
    register(lambda *_: None)
    return model


def spectral() -> Pair:
    """A weight that a hook computes from another tensor before each call."""
    layer = nn.Conv2d(3, 3, 1)
    weight = layer.weight
    del layer._parameters["weight"]
    layer.register_parameter("weight_orig", weight)
    layer.weight = weight.detach()
    return Pair(layer, nn.BatchNorm2d(3))


NOT_FOLDED: dict[str, Callable[[], Pair]] = {
    "no-statistics": lambda: Pair(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
    "norm-subclass": lambda: Pair(nn.Conv2d(3, 3, 1), Scaled(3)),
    "layer-subclass": lambda: Pair(Odd(3, 3, 1), nn.BatchNorm2d(3)),
    "tied": tied,
    "layer-hook": lambda: hooked(0, ""),
    "layer-pre-hook": lambda: hooked(0, "pre_"),
    "norm-hook": lambda: hooked(1, ""),
    "norm-pre-hook": lambda: hooked(1, "pre_"),
    "weight-elsewhere": spectral,
    "instance-norm": lambda: Pair(nn.Conv2d(3, 3, 1), nn.InstanceNorm2d(3)),
}


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("name", NOT_FOLDED)
def test_what_cannot_be_folded_exactly_is_left(name: str, traceable: bool) -> None:
    model = ready(NOT_FOLDED[name]())
    model.traceable = traceable
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    if name != "weight-elsewhere":
        before = model(x)
    assert fold(model, x) == ()
    if name != "weight-elsewhere":
        assert torch.equal(model(x), before)


def test_linear_and_batch_norm_disagree_on_the_axis() -> None:
    """On ``[batch, 5, 5]`` a Linear's channels are the last axis and the norm's are the second."""
    model = ready(Pair(nn.Linear(5, 5), nn.BatchNorm1d(5)))
    x = torch.randn(2, 5, 5, dtype=torch.float64)
    before = model(x)
    assert fold(model, x) == ()
    assert torch.equal(model(x), before)


def test_an_untraceable_model_folds_neighbours_that_nothing_else_uses() -> None:
    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.body = nn.Sequential(
                nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(),
                nn.BatchNorm2d(4),
            )  # fmt: skip
            self.shared = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.alias = self.shared[0]

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x))
            if x.mean() > 1e9:
                return x
            return self.alias(self.shared(self.body(x)))

    model = ready(Untraceable())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert trace(model, x[:1]) is None
    before = model(x)
    assert fold(model, x) == (FoldedPair("body.0", "body.1"),)
    torch.testing.assert_close(model(x), before, **EXACT)


def test_replacing_by_name() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), nn.ModuleList([nn.ReLU()]))})
    new = nn.Identity()
    replace_module(model, "a.1.0", new)
    assert model["a"][1][0] is new
    replace_module(model, "a", new)
    assert model["a"] is new


def test_same_outputs() -> None:
    before = torch.tensor([1.0, -100.0])
    assert same_outputs(before, before + 0.01)
    assert not same_outputs(before, before + 0.2)
    assert not same_outputs(before, before * float("nan"))
    assert same_outputs(before * 0, before * 0)


class Cancelling(nn.Module):
    """Adds much and takes it away again, which leaves little of what a float32 knew."""

    def __init__(self, *, wrong: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.wrong = wrong
        nn.init.uniform_(self.norm.running_mean, -1, 1)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.wrong:
            y = y + self.conv.weight.sum()
        return (y + 1e5) - 1e5


def test_rounding_that_the_network_makes_much_of_is_no_reason_against_folding() -> None:
    torch.manual_seed(0)
    model, example = Cancelling().eval(), torch.randn(1, 3, 6, 6)
    network = prepare(model, example)
    assert [pair.norm for pair in network.folded] == ["norm"]
    assert network.graph is not None
    # The fold itself is right, as double precision shows: the weights alone are rounded.
    with torch.no_grad():
        exact = model.double()(example.double())
        assert (network.model.double()(example.double()) - exact).abs().max() < 1e-5


def test_a_fold_that_changes_such_a_network_is_undone() -> None:
    torch.manual_seed(0)
    network = prepare(Cancelling(wrong=True).eval(), torch.randn(1, 3, 6, 6))
    assert network.folded == ()
