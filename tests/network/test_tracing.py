"""Graphs recorded while the forward runs: they compute the same, for any number of images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from compress.modules.attention import attention_names, unpack
from compress.network.sites import find_sites
from compress.network.tracing import ends_in_sigmoid, trace


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)


class ChecksSize(Base):
    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % 4 or width % 4:
            raise ValueError("sides must be multiples of four")
        assert x.dim() == 4, x.shape
        assert isinstance(x, Tensor)
        if not x.is_floating_point() or x.dtype != torch.float32:
            x = x.float()
        return self.b(self.a(x))


class Chunks(Base):
    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.a(x).chunk(2, 1))
        parts.append(parts[-1].relu())
        return self.b(torch.cat(parts[1:], 1))


class Unpacks(Base):
    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).split((6, 6), dim=1)
        return self.b(torch.cat([*reversed((left, right))], 1))


class Resizes(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.a(F.avg_pool2d(x, 2)), size=x.shape[2:], mode="nearest")
        sides = [math.ceil(n / 2) for n in y.shape[2:]]
        return F.adaptive_avg_pool2d(self.b(y), sides)


class Tokens(Base):
    """Reads the number of images, and makes tensors of that size."""

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        tokens = self.a(x).reshape(n, -1, height * width).transpose(1, 2)
        extra = torch.zeros(n, 1, tokens.size(2), device=x.device) + 0.5
        tokens = torch.cat([extra, tokens], dim=1)
        assert len(tokens) == n
        return tokens.reshape(n * tokens.shape[1], 12).view(n, -1, 12).mean(1)


class Loops(Base):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleDict({"x": nn.Conv2d(12, 12, 1), "y": nn.Conv2d(12, 12, 1)})

    def forward(self, x: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
        x = self.a(x)
        for layer in self.more.values():
            x = layer(x) + x
        if mask is not None:
            x = x * mask
        return self.b(x) if scale is None else self.b(x) * scale


class Nested(Base):
    """Several outputs; the first tensor is the main one."""

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        y = self.a(x)
        z = self.b(y.relu_())
        return {"logits": y.mean((2, 3)), "maps": z}, [z]


@dataclass
class Output:
    logits: Tensor
    features: list[Tensor]


class Structured(Base):
    def forward(self, x: Tensor) -> Output:
        y = self.a(x)
        return Output(self.b(y), [y])


class Parameter(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(12, 1, 1))
        self.register_buffer("shift", torch.rand(12, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.b.weight - self.b.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(self.a(x) * self.scale + self.shift, weight, padding=1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x[:, :1].flatten(2).transpose(1, 2).expand(-1, -1, 12))


class _Swish(torch.autograd.Function):
    """As networks write it that want to save memory in training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return gradients[0] * s * (1 + x * (1 - s))


class OwnFunction(nn.Module):
    """Its activation is an autograd function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(_Swish.apply(self.first(x)))
        return found


class Assigns(Base):
    """Writes into parts of what it has computed."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, 2:5, ::2] = y[:, 2:5, 1::2] * 2
        y[:, -1] += y[:, 0]
        return self.b(y)


class MakesModules(Base):
    """Makes modules without parameters where it needs them."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.ReplicationPad2d((0, 4 - x.shape[3] % 4, 0, 1))(self.a(x))
        return nn.Softmax(dim=1)(self.b(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2))(y)))


class Windows(Base):
    """Cuts images into windows, and counts images by dividing how many windows there are."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        height, width = y.shape[2:]
        windows = y.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12, 4, 4)
        images = int(windows.shape[0] / (height * width / 4 / 4))
        assert images == round(windows.shape[0] / 6) == math.floor(windows.shape[0] / 6)
        windows = windows.view(images, height // 4, width // 4, 12, 4, 4)
        whole = windows.permute(0, 3, 1, 4, 2, 5).reshape(images, 12, height, width)
        return self.b(whole).flatten(1).view(math.ceil(windows.shape[0] / 1.0), -1)


TRACED: list[Callable[[], nn.Module]] = [
    ChecksSize, Chunks, Unpacks, Resizes, Tokens, Loops, Nested, Structured, Parameter, Attention,
    OwnFunction, Assigns, Windows, MakesModules,
]  # fmt: skip


def by_hand(result: object) -> list[Tensor]:
    """All tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, dict):
        result = list(result.values())
    if hasattr(result, "__dataclass_fields__"):
        result = list(vars(result).values())
    found: list[Tensor] = []
    for part in result if isinstance(result, tuple | list) else ():
        found += by_hand(part)
    return found


def assert_equal_tensors(found: tuple[Tensor, ...], result: object) -> None:
    expected = by_hand(result)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("make", TRACED, ids=lambda m: m.__name__)
def test_the_graph_computes_the_same_for_any_number_of_images(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    unpack(model, attention_names(model))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    graph = trace(model, torch.rand(1, 3, 8, 12))
    assert graph is not None
    traced = fx.GraphModule(model, graph)
    for count in (1, 2, 7, 22):
        x = torch.rand(count, 3, 8, 12)
        with torch.no_grad():
            assert_equal_tensors(traced(x.clone()), model(x.clone()))
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    assert called <= set(dict(model.named_modules()))
    assert called
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_numbers_of_the_forward_leave_no_nodes() -> None:
    """Checks of the size change nothing about the graph."""
    plain = trace(nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3)), torch.rand(1, 3, 8, 8))
    checked = trace(ChecksSize().eval(), torch.rand(1, 3, 8, 8))
    assert plain is not None
    assert checked is not None
    assert len(checked.nodes) == len(plain.nodes)


class Stack(nn.Module):
    """Torch's own encoder or decoder, with tokens along the first axis or the second."""

    def __init__(self, kind: str, mask: str = "none", *, batch_first: bool = True) -> None:
        super().__init__()
        given = {"batch_first": batch_first, "dim_feedforward": 24}
        self.kind, self.mask = kind, mask
        self.images = 0 if batch_first else 1
        self.body: nn.Module
        if kind == "encoder":
            layer = nn.TransformerEncoderLayer(12, 3, **given)
            self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        else:
            self.body = nn.TransformerDecoder(nn.TransformerDecoderLayer(12, 3, **given), 2)
        self.register_buffer("buffer", nn.Transformer.generate_square_subsequent_mask(8))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0].transpose(0, self.images)
        masks = {
            "none": lambda: None,
            "buffer": lambda: self.buffer,
            "made": lambda: nn.Transformer.generate_square_subsequent_mask(8),
        }
        mask = masks[self.mask]()
        found: Tensor = self.body(x, mask) if self.kind == "encoder" else self.body(x, x, mask)
        return found.transpose(0, self.images)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "buffer", "made"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_encoders_and_decoders_are_followed_inside(
    kind: str, mask: str, *, batch_first: bool
) -> None:
    """Not where they look at the numbers of a mask: then they are single nodes."""
    torch.manual_seed(0)
    model = Stack(kind, mask, batch_first=batch_first).eval()
    unpack(model, attention_names(model))
    graph = trace(model, torch.rand(1, 3, 8, 12))
    assert graph is not None
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    assert ("body" in called) == (mask == "buffer")
    assert ("body.layers.1.linear2" in called) == (mask != "buffer")
    traced = fx.GraphModule(model, graph)
    for count in (1, 5, 8):
        x = torch.rand(count, 3, 8, 12)
        with torch.no_grad():
            assert_equal_tensors(traced(x), model(x))


class ByContent(Base):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        decide = {
            "branch": lambda: bool(y.mean() > 1e9),
            "item": lambda: y.mean().item() > 1e9,
            "list": lambda: y.mean((1, 2, 3)).tolist()[0] > 1e9,
            "float": lambda: float(y.mean()) > 1e9,
            "equal": lambda: torch.equal(y, y + 1),
            "int": lambda: int(y.mean() * 1e-9) > 3,
        }[self.how]
        return y if decide() else self.b(y)


@pytest.mark.parametrize("how", ["branch", "item", "list", "float", "equal", "int"])
def test_a_forward_that_decides_by_content_has_no_graph(how: str) -> None:
    assert trace(ByContent(how).eval(), torch.rand(1, 3, 8, 8)) is None


class AssignsToView(Base):
    """Writes into memory that another name shares."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        part = y[:, :3]
        part[:, 1] = 0.0
        return self.b(y)


def test_functions_mapped_over_images_have_no_graph() -> None:
    """Their C++ would crash on what the forward is traced with."""

    class Mapped(Base):
        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda image: self.b(self.a(image[None]))[0])(x)

    assert trace(Mapped().eval(), torch.rand(1, 3, 8, 8)) is None
    a, b = find_sites(Mapped().eval(), torch.rand(1, 3, 8, 8))
    assert a.skip == b.skip == "it runs within torch.vmap or torch.func"


def test_writing_into_shared_memory_has_no_graph() -> None:
    assert trace(AssignsToView().eval(), torch.rand(1, 3, 8, 8)) is None


class ByCount(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y) if len(x) > 1 else y


def test_a_forward_that_decides_by_the_number_of_images_has_no_graph() -> None:
    assert trace(ByCount().eval(), torch.rand(1, 3, 8, 8)) is None


@pytest.mark.parametrize(
    ("last", "expected"),
    [(nn.Sigmoid(), True), (torch.sigmoid, True), (F.sigmoid, True), (lambda x: x.sigmoid(), True),
     (nn.Softmax(1), False), (nn.Identity(), False), (torch.tanh, False)],
)  # fmt: skip
def test_a_sigmoid_at_the_end_is_seen(last: Callable[[Tensor], Tensor], expected: bool) -> None:
    class Ended(Base):
        def __init__(self) -> None:
            super().__init__()
            self.last = last

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.a(x))

    model = Ended().eval()
    graph = trace(model, torch.rand(1, 3, 8, 8))
    assert graph is not None
    assert ends_in_sigmoid(model, graph) is expected
