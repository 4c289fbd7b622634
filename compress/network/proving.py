"""Whether a subclass of a layer computes what its base does, found out by running it.

Many networks bring convolutions of their own that pad as TensorFlow does or standardise their
weight first. The products that such a layer computes are watched on one input, which tells the
weight and the padding that it may have. Whether a plain layer with these computes the same is then
seen on other inputs: of the size that the layer is called with and of others, odd and even, large
and small numbers. A layer that does anything else with its input gives itself away there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress.layers import LayerKind, kind_of, registered
from compress.linalg.geometry import Geometry
from compress.running.forward import evaluation_mode

Sides = tuple[tuple[int, int], ...]
# Rounding alone: the same products in another order.
_CLOSE = 1e-5
# What a product with the identity may cost, in multiply-accumulates.
_AFFORDABLE = 1 << 33
# Beside inputs around 1: numbers that a layer which clips, rounds or saturates would not survive.
_SCALES = (50.0, 0.02)
_PADS = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}
_aten = torch.ops.aten


class Unproved(Exception):  # noqa: N818 - says why a layer is kept, which is no error
    """The layer was not seen to compute what a plain one does; the message says why."""


@dataclass(frozen=True)
class Proved:
    """A plain layer that computes what a subclass does.

    Attributes:
        module: It, with a padding before it where that is unequal.
        padding: Zeros before and after each axis of the geometry; empty for the layer's own
            padding.
        fixed: Whether the subclass pads inputs of other sizes by other amounts.
    """

    module: nn.Module
    padding: Sides
    fixed: bool


def base_of(module: nn.Module) -> LayerKind | None:
    """The kind that a module is a subclass of, or None where it is none or exactly that."""
    if kind_of(module) is not None:
        return None
    return next((kind for kind in registered() if isinstance(module, kind.module_type)), None)


def plain_layer(module: nn.Module, padding: Sides) -> nn.Module:
    """Build the plain layer that stands for a subclass, its weights left to be filled in.

    Args:
        module: The subclass.
        padding: As in `Proved`.

    Raises:
        ValueError: The module is no subclass of a layer, or cannot be padded like that.
    """
    kind = base_of(module)
    if kind is None:
        raise ValueError(f"a {type(module).__name__} is no subclass of a layer")
    geometry = kind.geometry(module)
    unequal = any(before != after for before, after in padding)
    if padding:
        _check_padding(geometry, padding)
        own = tuple(0 if unequal else before for before, _ in padding)
        geometry = geometry.with_(padding=own, padding_mode="zeros")
    like = next(module.parameters(), torch.zeros(0))
    size = (geometry.groups, geometry.out_features, geometry.in_channels // geometry.groups)
    weight = torch.empty(*size, *geometry.kernel_size).to(like)
    biased = getattr(module, "bias", None) is not None
    bias = torch.empty(geometry.out_channels).to(like) if biased else None
    built = kind.build(geometry, weight, bias).train(module.training)
    for parameter in built.parameters():
        parameter.requires_grad_(like.requires_grad)
    if not unequal:
        return built
    sizes = built.get_parameter("weight").dim() - 2
    flat = [side for sides in reversed(padding[-sizes:]) for side in sides]
    # torch annotates each of them with a tuple of its own length.
    return nn.Sequential(_PADS[sizes](tuple(flat)), built)  # type: ignore[arg-type]


def _check_padding(geometry: Geometry, padding: Sides) -> None:
    # Further out there is nothing but zeros for a kernel to read.
    widest = [d * (k - 1) for d, k in zip(geometry.dilation, geometry.kernel_size, strict=True)]
    fits = len(padding) == len(widest) and all(
        0 <= side <= most for sides, most in zip(padding, widest, strict=True) for side in sides
    )
    if not fits or geometry.transposed or geometry.kind == "linear":
        raise ValueError(f"it pads by {padding}, which a plain layer in its place would not")


def prove(module: nn.Module, shapes: Collection[tuple[int, ...]]) -> Proved:
    """Find the plain layer that computes what a subclass of one does.

    Args:
        module: The subclass; left as it was.
        shapes: Those of the inputs that it is called with.

    Raises:
        Unproved: There is none, or none was found.
    """
    try:
        with torch.no_grad(), evaluation_mode(module):
            return _Proof(module, list(shapes)).proved()
    except (Unproved, KeyboardInterrupt):
        raise
    except ValueError as error:
        raise Unproved(str(error)) from error
    except BaseException as error:  # the user's forward may raise anything
        text = " ".join(str(error).split()) or type(error).__name__
        raise Unproved(f"it fails on other inputs ({text})") from error


class _Proof:
    def __init__(self, module: nn.Module, shapes: list[tuple[int, ...]]) -> None:
        kind = base_of(module)
        assert kind is not None  # nothing else is to be proved
        self.module, self.kind, self.geometry = module, kind, kind.geometry(module)
        self.shapes = shapes
        like = next(module.parameters(), torch.zeros(0))
        self.like = like.detach()
        self.generator = torch.Generator().manual_seed(0)

    def proved(self) -> Proved:
        watched = [self._watched((1, *shape[1:]), 1.0) for shape in self.shapes]
        paddings = {seen.padding for seen in watched}
        if len(paddings) > 1:
            raise Unproved("its padding differs between its calls in one forward pass")
        (padding,) = paddings
        weight = self._weight(watched[0])
        bias = self._bias()
        plain = self._plain(padding, weight, bias)
        for seen in watched:
            self._compare(seen, plain)
        fixed = False
        for shape, scale in zip(self._other_shapes(), _SCALES, strict=True):
            seen = self._watched(shape, scale)
            fixed = fixed or seen.padding != padding
            same = seen.padding == padding
            self._compare(seen, plain if same else self._plain(seen.padding, weight, bias))
        return Proved(plain, padding, fixed)

    def _watched(self, shape: tuple[int, ...], scale: float) -> _Seen:
        x = (torch.randn(shape, generator=self.generator) * scale).to(self.like)
        with _Products() as products:
            y = self.module(x.clone())
        if not isinstance(y, Tensor):
            raise Unproved("it does not return one tensor")
        return _Seen(x, y, products, self._padding(products))

    def _padding(self, products: _Products) -> Sides:
        """Zeros before and after each axis; empty where these are the layer's own."""
        if self.kind.name == "Linear" or self.geometry.transposed:
            return ()
        if len(products.convolutions) != 1:
            raise Unproved(f"it computes {len(products.convolutions)} convolutions")
        arguments = products.convolutions[0]
        self._check_attributes(arguments)
        own = self.geometry.sides()
        total = [[0, 0] for _ in own]
        for axis, amount in enumerate(reversed(arguments[4])):
            total[-1 - axis] = [amount, amount]
        for pad in products.pads:
            for axis in range(len(pad) // 2):
                before, after = pad[2 * axis : 2 * axis + 2]
                if axis >= len(total):
                    raise Unproved("it pads its channels")
                total[-1 - axis][0] += before
                total[-1 - axis][1] += after
        found = tuple((before, after) for before, after in total)
        return () if found == own or self.geometry.padding_mode != "zeros" else found

    def _check_attributes(self, arguments: Sequence[Any]) -> None:
        """Check that a convolution ran with the numbers that the layer says it has."""
        dims = len(arguments[3])
        wanted = (self.geometry.stride[-dims:], self.geometry.dilation[-dims:])
        found = (tuple(arguments[3]), tuple(arguments[5]))
        if found != wanted or arguments[8] != self.geometry.groups or arguments[6]:
            raise Unproved("it convolves with another stride, dilation or groups than it says")

    def _weight(self, seen: _Seen) -> Tensor:
        products = seen.products
        if self.kind.name != "Linear":
            if len(products.convolutions) != 1:
                raise Unproved(f"it computes {len(products.convolutions)} convolutions")
            found: Tensor = products.convolutions[0][1]
            return found.clone()
        if len(products.matrices) == 1:
            return products.matrices[0].mT.clone()
        inputs, outputs = self.geometry.in_channels, self.geometry.out_channels
        if inputs * inputs * outputs > _AFFORDABLE:
            raise Unproved("it computes several products and is too large to probe")
        identity = torch.eye(inputs).to(self.like)
        difference: Tensor = self.module(identity) - self.module(torch.zeros_like(identity))
        return difference.mT.clone()

    def _bias(self) -> Tensor | None:
        found: Tensor = self.module(torch.zeros(self._other_shapes()[0]).to(self.like))
        if self.kind.name == "Linear":
            found = found.reshape(-1, found.shape[-1])[0]
        else:
            found = found[0].flatten(1)[:, 0]
        own = getattr(self.module, "bias", None)
        if own is None:
            return None  # what it adds none the less shows in the comparison
        same = own.shape == found.shape and torch.allclose(own, found, rtol=_CLOSE, atol=1e-7)
        return own.detach().clone() if same else found.clone()

    def _plain(self, padding: Sides, weight: Tensor, bias: Tensor | None) -> nn.Module:
        built = plain_layer(self.module, padding)
        layer = built[-1] if isinstance(built, nn.Sequential) else built
        for name, value in (("weight", weight), ("bias", bias)):
            parameter = layer._parameters[name]
            if value is None or parameter is None:
                continue
            if value.shape != parameter.shape:
                raise Unproved(f"its {name} has the shape {tuple(value.shape)}")
            parameter.copy_(value)
        return built.eval()

    def _compare(self, seen: _Seen, plain: nn.Module) -> None:
        expected: Tensor = plain(seen.x)
        scale = expected.abs().max().clamp_min(1e-30)
        same = expected.shape == seen.y.shape and bool(
            (expected - seen.y).abs().max() <= _CLOSE * scale
        )
        if not same:
            raise Unproved("a plain layer with its weight computes something else")

    def _other_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of small inputs, every axis odd in one and even in the other."""
        shape, g = self.shapes[0], self.geometry
        if self.kind.name == "Linear":
            return (3, *shape[1:]), (4, *shape[1:])
        dims = len(shape) - 2
        spans = [
            d * (k - 1) + s + 2 for d, k, s in zip(g.dilation, g.kernel_size, g.stride, strict=True)
        ][-dims:]
        first = [n + (n + axis) % 2 for axis, n in enumerate(spans)]
        return (1, shape[1], *first), (1, shape[1], *(n + 1 for n in first))


@dataclass(frozen=True)
class _Seen:
    """One forward pass of a subclass."""

    x: Tensor
    y: Tensor
    products: _Products
    padding: Sides


@dataclass(eq=False)
class _Products(TorchDispatchMode):
    """Notes what is multiplied while it is entered.

    Attributes:
        convolutions: The arguments of each convolution.
        matrices: The right-hand factor of each product of matrices.
        pads: The amounts of each padding with zeros, the last axis first.
    """

    convolutions: list[Sequence[Any]] = field(default_factory=list)
    matrices: list[Tensor] = field(default_factory=list)
    pads: list[Sequence[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it so

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func is _aten.convolution.default:
            self.convolutions.append(args)
        elif func is _aten.addmm.default:
            self.matrices.append(args[2])
        elif func in (_aten.mm.default, _aten.bmm.default):
            self.matrices.append(args[1])
        elif func is _aten.constant_pad_nd.default:
            value = args[2] if len(args) > 2 else 0
            if math.isclose(value, 0):
                self.pads.append(args[1])
        return func(*args, **(kwargs or {}))
