"""The graph of a network's forward, recorded while it runs on an example.

`torch.fx` passes proxies through the forward and notes what is done to them. Here every proxy also
carries the value that it has for an example, so that the forward may look at what it computes:
check sizes, loop over the parts of a split, take numbers out of shapes. Numbers are put into the
graph as they are, except those that count images: the graph holds for any number of them, and for
images of the example's size. A forward that decides by what its images hold has no such graph.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch import apis, eager_transforms

from compress.network.norms import NORMS, after_norm
from compress.running.forward import evaluation_mode, run_model, same_outputs
from compress.running.structure import arguments, main_tensor, mapped, rebuilt, tensors

# Images in the example: a prime that sizes and channels are hardly ever multiples of, since
# multiples of it are taken to count images. For large images memory matters more.
IMAGES, IMAGES_IF_LARGE = 11, 3
_LARGE = 3 * 320 * 320
# Where torch.fx puts tensors that a forward makes without looking at its input.
_CONSTANT = "_tensor_constant"
# Torch's own modules that only call others: what is inside belongs to the graph like any layers.
_OPEN = (nn.Transformer, nn.TransformerDecoder, nn.TransformerDecoderLayer, nn.TransformerEncoder)
# Nodes whose targets are names in the model.
_NAMED = ("call_module", "get_attr")
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.layout)


def trace(model: nn.Module, example: Any, others: Sequence[Any] = ()) -> fx.Graph | None:
    """Return the graph of the model in eval mode, or None where it has no single graph.

    Args:
        model: The network.
        example: One image's inputs ``[1, ...]``.
        others: Inputs of other sizes that the graph must hold for too.

    Returns:
        A graph whose calls name the model's modules, whose one placeholder stands for all inputs,
        and whose output is a tuple of all tensors that the forward returns. It is checked against
        the forward on other images and other numbers of them. Torch's encoders and decoders are
        followed inside, or single nodes where they decide by values, as of a mask in a buffer.
    """
    graph = _traced(model, example, others, frozenset())
    whole = frozenset(m for m in model.modules() if isinstance(m, _OPEN))
    return _traced(model, example, others, whole) if graph is None and whole else graph


def _traced(
    model: nn.Module, example: Any, others: Sequence[Any], whole: frozenset[nn.Module]
) -> fx.Graph | None:
    """The graph, as of `trace`, with some more modules as single nodes."""
    large = main_tensor(example).numel() > _LARGE
    images = _images(example, IMAGES_IF_LARGE if large else IMAGES)
    root = _AllOutputs(model)
    own = _tensors_of(root)
    try:
        with evaluation_mode(model), torch.no_grad():
            run_model(model, images)  # so that buffers of the forward's own making are there
            graph = _Tracer(images, whole | _special_norms(model)).trace(root)
            made = _made_by_forward(graph, own, _tensors_of(root))
        constants = {n: v for n, v in vars(root).items() if n.startswith(_CONSTANT)} | made
        vars(model).update(constants)
        for node in graph.nodes:
            if node.op in _NAMED:
                node.target = str(node.target).removeprefix("model.")
        for node in reversed(graph.nodes):
            # Shapes that the forward only looked at.
            if node.target in (getattr, int, len, operator.getitem) and not node.users:
                graph.erase_node(node)
        graph.lint()
        return graph if _holds(model, graph, (example, *others)) else None
    except KeyboardInterrupt:
        raise
    except BaseException:  # the user's forward runs on proxies, and may raise anything
        return None


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


def _made_by_forward(
    graph: fx.Graph, before: Collection[str], after: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Buffers that a forward made or filled, as constants that the graph refers to instead."""
    made: dict[str, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in after and node.target not in before:
            name = f"{_CONSTANT}_of_{str(node.target).replace('.', '_')}"
            made[name], node.target = after[str(node.target)], name
    return made


def ends_in_sigmoid(model: nn.Module, graph: fx.Graph) -> bool:
    """Whether a sigmoid gives a network's only output."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    if len(output.all_input_nodes) != 1:
        return False
    (last,) = output.all_input_nodes
    if last.op == "call_module":
        return isinstance(model.get_submodule(str(last.target)), nn.Sigmoid)
    return getattr(last.target, "__name__", last.target) in ("sigmoid", "sigmoid_")


def _special_norms(model: nn.Module) -> frozenset[nn.Module]:
    found = [m for m in model.modules() if isinstance(m, NORMS) and type(m) not in NORMS]
    return frozenset(norm for norm in found if after_norm(norm) is not None)


def _images(example: Any, count: int) -> Any:
    """The example and variations of it, which a forward that looks at its images may tell apart."""
    return mapped(example, lambda tensor: _variations(tensor, count))


def _variations(example: Tensor, count: int) -> Tensor:
    if not example.is_floating_point():
        return example.expand(count, *example.shape[1:]).clone()
    generator = torch.Generator().manual_seed(0)
    scale = 0.5 + torch.rand(count, *[1] * (example.dim() - 1), generator=generator)
    noise = torch.randn(count, *example.shape[1:], generator=generator) * 0.1
    spread = example.std() if example.numel() > 1 else example.abs()
    return example * scale.to(example) + noise.to(example) * spread


def _holds(model: nn.Module, graph: fx.Graph, examples: Sequence[Any]) -> bool:
    """Whether the graph computes what the forward does, for two numbers of other images."""
    traced = fx.GraphModule(model, graph)
    for example in examples:
        last = mapped(_images(example, 5), lambda tensor: tensor.flip(0)[:1])
        for images in (_images(example, 2), last):
            with evaluation_mode(model), torch.no_grad():
                expected = run_model(model, images)
            with evaluation_mode(model), torch.no_grad():
                # Not by a call, which would print a traceback of what it raises.
                found = traced.forward(mapped(images, lambda tensor: tensor.clone()))
            if len(tensors(expected)) != len(found):
                return False
            if not same_outputs(expected, rebuilt(expected, found)):
                return False
    return True


class _AllOutputs(nn.Module):
    """A model called with only its inputs, giving all tensors that it returns.

    What else a forward could take has its default: a proxy in its place would lead a forward that
    asks whether an argument ``is None`` the wrong way.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> tuple[Tensor, ...]:
        by_position, by_name = arguments(_opened(x))
        return tuple(tensors(self.model(*by_position, **by_name)).values())


def _opened(x: Any) -> Any:
    """Return what stands for several inputs as the structure that it is."""
    if isinstance(x, Tensor):
        return x
    if isinstance(x, dict):
        return {key: _opened(_part(x, key)) for key in x.value}  # type: ignore[attr-defined]  # a proxy
    return tuple(_opened(_part(x, index)) for index in range(len(x)))


class _DependsOnData(Exception):  # noqa: N818 - says what the forward does, and goes no further
    """The forward decides by the content of its images, so that no one graph stands for it."""


# What takes numbers out of tensors.
_READING = frozenset(("item", "tolist", "numpy", "equal", "allclose", "is_nonzero"))


# x[i], where the type checker sees a value that claims no class of its own.
_part: Callable[[Any, Any], Any] = operator.getitem


def _with_part(whole: Tensor, key: Any, part: Any) -> Tensor:
    """Return a tensor in which ``whole[key]`` is another."""
    made = whole.clone()
    made[key] = part
    return made


class _Valued(fx.Proxy):
    """A proxy that knows its value for the example, and answers python's questions by it."""

    value: Any

    @property
    def __class__(self) -> type:  # so that isinstance(x, Tensor) is true in the forward
        return type(self.value)

    @__class__.setter
    def __class__(self, _: type) -> None:
        raise TypeError("a traced value keeps its type")

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.value, name)
        if callable(found):
            return lambda *args, **kwargs: self.tracer.create_proxy(
                "call_method", name, (self, *args), kwargs
            )
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __bool__(self) -> bool:
        return bool(self._looked_at())

    def __len__(self) -> int:
        value = len(self.value)
        self.tracer.taken(self, len, value)  # type: ignore[attr-defined]  # a tracer of ours
        return value

    def __int__(self) -> int:
        value = int(self._looked_at())
        self.tracer.taken(self, int, value)  # type: ignore[attr-defined]  # a tracer of ours
        return value

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, digits), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __index__(self) -> int:
        return operator.index(self._looked_at())

    def __float__(self) -> float:
        return float(self._looked_at())

    def _looked_at(self) -> Any:
        if isinstance(self.value, Tensor):
            raise _DependsOnData
        return self.value

    def __setitem__(self, key: Any, part: Any) -> None:
        # The name stands for another tensor from here on. Where others shared its memory, the graph
        # is not what the forward is, which the check afterwards shows.
        made = self.tracer.create_proxy("call_function", _with_part, (self, key, part), {})
        self.node, self.value = made.node, made.value

    def __iter__(self) -> Iterator[Any]:
        return iter([_part(self, i) for i in range(len(self.value))])


class _Tracer(fx.Tracer):
    """Traces through the user's modules, with values, and stops at torch's and this package's own.

    Args:
        images: The example's inputs ``[N, ...]``.
        single: Modules that are one node each, beside those of torch: subclasses of BatchNorm that
            can be folded, and those that cannot be followed inside.
    """

    proxy_buffer_attributes = True  # as parameters are, or they could not meet a number of images

    def __init__(self, images: Any, single: frozenset[nn.Module]) -> None:
        super().__init__()
        self.images, self.single = images, single
        self.count = len(main_tensor(images))
        self.running = False
        self.whole: dict[int, fx.Node] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace a module."""
        with _factories(self), _no_transforms():
            return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one node of the graph."""
        if module_qualified_name == "model":
            return False
        # Unpacked attention stays open: its projections are layers like any other.
        home = type(m).__module__
        own = home.startswith("compress.modules") and "attention" not in home
        leaf = super().is_leaf_module(m, module_qualified_name) and not isinstance(m, _OPEN)
        return own or m in self.single or leaf

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call a module: as a node, or through its forward."""
        # Paddings and the like may be made in the forward, and belong to no network.
        if self.running or m not in (self.submodule_paths or {}):
            return forward(*args, **kwargs)
        if not args and len(kwargs) == 1 and self.is_leaf_module(m, ""):
            args, kwargs = (*kwargs.values(),), {}  # what reads the graph finds the input there
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a module's attribute: parameters as nodes, unless a value is being computed."""
        if self.running:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        """Turn an argument into what a node holds."""
        # First of all, because values claim the class of what they stand for.
        if issubclass(type(a), fx.Proxy):
            return a.node
        return self.whole[a] if type(a) is int and a in self.whole else super().create_arg(a)

    def taken(self, proxy: fx.Proxy, by: Callable[..., int], value: int) -> None:
        """Note that the forward got a plain number that counts images, by ``int`` or ``len``.

        Python lets nothing but a plain number come of that. Where the forward hands this number on,
        as in ``x.view(int(windows / per_image), ...)``, the graph computes it.
        """
        if not self.running and self._counts_images(value):
            self.whole[value] = self.create_node("call_function", by, (proxy.node,), {})

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *_: Any,
        **__: Any,
    ) -> Any:
        """Add a node; return its proxy, or what it gives where that is the same for all images."""
        if getattr(target, "__name__", target) in _READING:
            raise _DependsOnData
        value = self._value(kind, target, args, kwargs)
        if isinstance(value, _PLAIN) and not self._counts_images(value):
            return value
        name = str(target).removeprefix("model.").replace(".", "_") if kind in _NAMED else None
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs), name)
        proxy = _Valued(node, self)
        proxy.value = value
        if isinstance(value, torch.Size):
            return _Size(_part(proxy, i) for i in range(len(value)))
        return proxy

    def _counts_images(self, value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and value != 0 and value % self.count == 0

    def _value(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a node gives for the example."""
        if kind == "placeholder":
            return self.images
        args, kwargs = _values(args), _values(kwargs)
        self.running = True
        try:
            if kind == "get_attr":
                return operator.attrgetter(target)(self.root)
            if kind == "call_module":
                return self.root.get_submodule(target)(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)
        finally:
            self.running = False


class _Size(tuple[Any, ...]):
    """A shape: whole numbers, and proxies where they count images."""

    __slots__ = ()

    def numel(self) -> Any:
        """Return the product, as that of `torch.Size`."""
        product: Any = 1
        for size in self:
            product = product * size
        return product


# They take no tensor, so that torch does not ask a proxy among their arguments to stand in.
_FACTORIES = (
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn",
    "tensor", "zeros",
)  # fmt: skip


@contextmanager
def _factories(tracer: _Tracer) -> Iterator[None]:
    """Make nodes of calls like ``torch.zeros(len(x), 3)`` whose numbers count images."""

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if tracer.running or not _holds_proxy((args, kwargs)):
                return function(*args, **kwargs)
            return tracer.create_proxy("call_function", function, args, kwargs)

        return call

    originals = {name: getattr(torch, name) for name in _FACTORIES}
    try:
        for name, function in originals.items():
            setattr(torch, name, wrapped(function))
        with _own_functions(wrapped):
            yield
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)


@contextmanager
def _own_functions(wrapped: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Make nodes of the user's own autograd functions, whose C++ would crash on a proxy."""
    parent = torch.autograd.Function
    original = vars(parent)["apply"]
    known: dict[type, Callable[..., Any]] = {}

    def applied(own: type) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return original.__get__(None, own)(*args, **kwargs)

        call.__name__ = call.__qualname__ = f"{own.__name__}_apply"
        return call

    def apply(own: type, *args: Any, **kwargs: Any) -> Any:
        return wrapped(known.setdefault(own, applied(own)))(*args, **kwargs)

    setattr(parent, "apply", classmethod(apply))  # noqa: B010 - plainly, types forbid it
    try:
        yield
    finally:
        setattr(parent, "apply", original)  # noqa: B010


@contextmanager
def _no_transforms() -> Iterator[None]:
    """Let no proxies into `torch.vmap` and `torch.func`, whose C++ would crash on them."""

    def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if _holds_proxy((args, kwargs)):
                raise _DependsOnData
            return function(*args, **kwargs)

        return call

    entries = [(apis, "vmap_impl"), (eager_transforms, "_create_differentiable")]
    originals = [(home, name, getattr(home, name)) for home, name in entries]
    try:
        for home, name, function in originals:
            setattr(home, name, refusing(function))
        yield
    finally:
        for home, name, function in originals:
            setattr(home, name, function)


def _holds_proxy(values: Any) -> bool:
    found: list[Any] = []
    _mapped(values, found.append)
    return bool(found)


def _values(values: Any) -> Any:
    """Replace proxies by their values."""
    return _mapped(values, lambda proxy: proxy.value)


def _mapped(values: Any, change: Callable[[Any], Any]) -> Any:
    if issubclass(type(values), fx.Proxy):
        return change(values)
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*[_mapped(v, change) for v in values])
    if isinstance(values, tuple | list):
        return (tuple if isinstance(values, tuple) else list)(_mapped(v, change) for v in values)
    if isinstance(values, dict):
        return {k: _mapped(v, change) for k, v in values.items()}
    if isinstance(values, slice):
        parts = (values.start, values.stop, values.step)
        return slice(*[_mapped(v, change) for v in parts])
    return values
