"""Forward passes: what a model returns, evaluation mode, hooks, parameters frozen."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.overrides import TorchFunctionMode

from compress.errors import CompressError, GradientError, ModelError, one_line, what_raised
from compress.running.attributes import kept_attributes
from compress.running.structure import arguments, cloned, shapes, tensors


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run in eval mode; restore training flags, buffers, plain attributes and the random state."""
    flags = {module: module.training for module in model.modules()}
    # Norms leave their buffers alone in eval mode, but a forward may do as it likes with its own.
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in flags
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    names = {m: (dict(m._buffers), set(m._non_persistent_buffers_set)) for m in flags}
    state = torch.get_rng_state()
    devices = {t.device for t in itertools.chain(model.parameters(), model.buffers()) if t.is_cuda}
    on_gpu = {device: torch.cuda.get_rng_state(device) for device in devices}
    model.eval()
    try:
        with kept_attributes(model):
            yield
    finally:
        torch.set_rng_state(state)
        for device, own in on_gpu.items():
            torch.cuda.set_rng_state(own, device)
        for module, (known, passing) in names.items():
            # Those that the forward made, or filled, are gone again.
            module._buffers.clear()
            module._buffers.update(known)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(passing)
        for _, _, buffer, value in buffers:
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
        for module, flag in flags.items():
            module.training = flag


ForwardHook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], object]


@contextmanager
def forward_hooks(
    hooks: dict[nn.Module, ForwardHook],
) -> Iterator[None]:
    """Attach forward hooks and remove them whatever happens.

    They see a module's inputs in the order of the call, also those that are passed by keyword.
    """

    def seeing_all(hook: ForwardHook) -> Callable[..., object]:
        def called(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> object:
            return hook(module, (*args, *kwargs.values()), output)

        return called

    handles = []
    try:
        for module, hook in hooks.items():
            handles.append(module.register_forward_hook(seeing_all(hook), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Take no gradients of parameters; restore what required them."""
    required = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)


@contextmanager
def gradients_begin(model: nn.Module) -> Iterator[None]:
    """Have gradients begin where real numbers do, in a model whose inputs hold none.

    Where gradients are enabled, the first modules that give real numbers give such as require them.
    """

    def hook(_: nn.Module, __: object, output: object) -> Tensor | None:
        real = isinstance(output, Tensor) and output.is_floating_point()
        if not isinstance(output, Tensor) or not real or output.requires_grad:
            return None
        # A copy, since what requires gradients itself may not be changed in place.
        return output.detach().requires_grad_().clone() if torch.is_grad_enabled() else None

    ends = [m for m in model.modules() if not any(m.children())]
    # Before all other hooks, which are to see what has gradients.
    handles = [m.register_forward_hook(hook, prepend=True) for m in ends]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def backward(value: Tensor, instead: str = "") -> None:
    """Take gradients of a value that a model's outputs give.

    Args:
        value: A single number.
        instead: What else can be done where none come, for the error.

    Raises:
        GradientError: No gradients come back; or the forward changes a value in place that they
            need, or computes what has no derivative.
    """
    if not value.requires_grad:
        raise GradientError(
            "No gradient comes back from the model's output: its forward runs under "
            "torch.inference_mode, or detaches or rounds what it computes.",
            f"Take that out of the forward{instead}.",
        )
    try:
        value.backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise GradientError(
                f"Gradients do not come through the model's forward: {one_line(error)}.",
                f"Let it compute what has derivatives{instead}.",
            ) from error
        raise GradientError(
            "Gradients do not come through the model's forward: it changes a value in place that "
            "they need, such as y[..., :2] = ... after y = x.sigmoid().",
            f"Let it change a clone{instead}.",
        ) from error


# Functions that write into their first argument, beside those whose names end in one underscore.
_WRITES = frozenset((
    "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__setitem__",
))  # fmt: skip


class _GradientsEverywhere(TorchFunctionMode):
    """Leave gradients on where code asks to switch them off, as ``torch.no_grad`` does.

    What it writes there into parameters and buffers, such as an average of what it has seen, stays
    without them, or one batch's graph would hang on to the next.

    Args:
        kept: The parameters and buffers.
    """

    def __init__(self, kept: Iterable[Tensor]) -> None:
        super().__init__()
        self.depth = 0  # of contexts within each other
        self.kept = {id(tensor) for tensor in kept}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            self.depth = max(self.depth + (-1 if args[0] else 1), 0)
            return func(*args) if args[0] else None
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        writes = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
        into = kwargs.get("out", args[0] if writes and args else None)
        if self.depth and isinstance(into, Tensor) and self._stays(into):
            with torch.no_grad():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _stays(self, tensor: Tensor) -> bool:
        base = tensor if tensor._base is None else tensor._base
        return id(base) in self.kept or (base.is_leaf and base.requires_grad)


def changes_allowed(*, in_place: bool) -> AbstractContextManager[object]:
    """Within this, gradients come through values that a forward changes in place, if wished.

    What they need is copied before it changes; watching for that takes a tenth of the time or more.
    Forward and backward passes have to lie within the same context.
    """
    return allow_mutation_on_saved_tensors() if in_place else nullcontext()


def run_with_gradients(model: nn.Module, inputs: Any) -> Any:
    """Run the model so that gradients can be taken; otherwise as `run_model`.

    A part of the network may run under ``torch.no_grad`` because it was not trained with the rest.
    What its errors cost is asked for nevertheless, so that has no effect here. Hooks that run
    meanwhile have to detach what they keep: it has no effect in them either.
    """
    kept = itertools.chain(model.parameters(), model.buffers())
    with torch.enable_grad(), _GradientsEverywhere(kept), _recurrent_gradients(model):
        return run_model(model, inputs)


def _recurrent_gradients(model: nn.Module) -> AbstractContextManager[object]:
    """Do without cuDNN for recurrent layers, of which it gives gradients in training mode only."""
    recurrent = (m for m in model.modules() if isinstance(m, nn.RNNBase))
    if any(p.is_cuda for m in recurrent for p in m.parameters()):
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()


def run_model(model: nn.Module, inputs: Any) -> Any:
    """Run the model and return all that its forward returns.

    Args:
        model: The network.
        inputs: A batch: a tensor, a tuple of what the forward takes by position, or a mapping of
            what it takes by name; see `compress.running.structure`. They are left as they are.

    Raises:
        ModelError: The forward fails, or its result holds no tensor.
    """
    by_position, by_name = arguments(cloned(inputs))  # a model may change its input in place
    try:
        result = model(*by_position, **by_name)
    except (CompressError, KeyboardInterrupt):
        raise  # of a hook of ours, which says what is wrong; or the user's wish
    except BaseException as error:  # the user's forward may raise anything, also SystemExit
        text = str(error).splitlines()[0] if str(error) else ""
        if not isinstance(error, Exception):
            text = what_raised(error)
        elif not text or isinstance(error, KeyError | ZeroDivisionError):
            text = f"{type(error).__name__}{f': {text}' if text else ''}"
        raise ModelError(
            f"The model's forward failed on {_shapes_in_words(inputs)}: {_explained(text, inputs)}"
        ) from error
    if not tensors(result):
        raise ModelError(
            f"The model's forward returned {type(result).__name__}, which holds no tensor; wrap it "
            "in a module that returns its logits."
        )
    return result


def _shapes_in_words(inputs: Any) -> str:
    found = shapes(inputs)
    if len(found) == 1:
        return f"an input of shape {next(iter(found.values()))}"
    return f"inputs of shapes {', '.join(f'{name} {shape}' for name, shape in found.items())}"


# How torch says that a layer and its input are of different types.
_TYPES_DIFFER = re.compile(r"type.*(double|half|bfloat16|float64)|mixed dtype", re.IGNORECASE)


def _explained(text: str, inputs: Any) -> str:
    """What went wrong, and what to do about it."""
    if "custom C++ ops" in text or "'torchvision::" in text:
        # What torchvision says then is long, and its inputs are not at fault.
        return (
            "torchvision's compiled operators, such as the one that drops overlapping boxes, "
            "cannot be loaded beside this torch. Install a torch and a torchvision of the same "
            "build, both for the CPU or both for the same CUDA."
        )
    if _TYPES_DIFFER.search(text):
        return (
            f"{text.removesuffix('.')}. compress runs the network in one number type, and part of "
            "its forward makes another: let it convert to the type of the layer that follows, as "
            "in x.to(self.conv.weight.dtype)."
        )
    return f"{text.removesuffix('.')}. {_advice(inputs)}"


def _advice(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return (
            "Check the number of channels and the image size (--resize, --crop) against what it "
            "was trained on."
        )
    return "Check what the data gives for each image against what the forward takes."


def require_parameters(model: nn.Module) -> None:
    """Raise `ModelError` for a model in which there is nothing to compress."""
    if next(model.parameters(), None) is None:
        raise ModelError(
            f"The model, a {type(model).__name__}, has no parameters, so that there is nothing to "
            "compress; is it the right one?"
        )


def require_tensors(model: nn.Module) -> None:
    """Raise `ModelError` for a model whose state holds what a file of tensors cannot.

    That is what a module's ``get_extra_state`` returns, where it is no tensor.
    """
    others = [n for n, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if others:
        raise ModelError(
            f"The state of the model holds more than tensors ({', '.join(others[:5])}, of "
            "get_extra_state), which a result could not hold; keep it in buffers, or leave it out."
        )


def same_outputs(before: Any, after: Any, room: Mapping[str, float] | None = None) -> bool:
    """Whether two results are equal, their real numbers within float32 rounding of each output.

    Args:
        before: A result of a forward.
        after: Another.
        room: By how much more some outputs may differ, by path, where that is known.
    """
    first, second = tensors(before), tensors(after)
    if first.keys() != second.keys():
        return False
    more = room or {}
    return all(_same(first[path], second[path], more.get(path, 0.0)) for path in first)


def _same(before: Tensor, after: Tensor, room: float) -> bool:
    if before.shape != after.shape or before.dtype != after.dtype:
        return False
    # Whole numbers may come of a comparison of real ones, which rounding can turn.
    if not before.is_floating_point() or not before.numel():
        return True
    scale = before.abs().max().clamp_min(1e-12)
    return bool((before - after).abs().max() <= 1e-3 * scale + room)
