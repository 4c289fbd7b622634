"""Forward passes: a model's main output, evaluation mode, hooks, parameters frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn

from compress.errors import CompressError, ModelError, what_raised
from compress.running.attributes import kept_attributes


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
    state = torch.get_rng_state()
    model.eval()
    try:
        with kept_attributes(model):
            yield
    finally:
        torch.set_rng_state(state)
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
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
    """Attach forward hooks and remove them whatever happens."""
    handles = []
    try:
        for module, hook in hooks.items():
            handles.append(module.register_forward_hook(hook))
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


def run_model(model: nn.Module, inputs: Tensor) -> Tensor:
    """Run the model and return its main output tensor.

    Models that return a tuple, a dict or an object with ``logits`` give their first tensor.

    Raises:
        ModelError: The forward fails, or its result holds no tensor.
    """
    try:
        result = model(inputs.clone())  # a model may change its input in place
    except (CompressError, KeyboardInterrupt):
        raise  # of a hook of ours, which says what is wrong; or the user's wish
    except BaseException as error:  # the user's forward may raise anything, also SystemExit
        text = str(error).splitlines()[0] if str(error) else ""
        if not isinstance(error, Exception):
            text = what_raised(error)
        elif not text or isinstance(error, KeyError | ZeroDivisionError):
            text = f"{type(error).__name__}{f': {text}' if text else ''}"
        raise ModelError(
            f"The model's forward failed on an input of shape {tuple(inputs.shape)}: {text}. "
            "Check the number of channels and the image size (--resize, --crop) against what it "
            "was trained on."
        ) from error
    return main_output(result)


def main_output(result: object) -> Tensor:
    """Return the main tensor of what a forward returned: its logits, else the first there is.

    Raises:
        ModelError: It holds none.
    """
    found = _main(result)
    if found is None:
        raise ModelError(
            f"The model's forward returned {type(result).__name__}, which holds no tensor; wrap it "
            "in a module that returns its logits."
        )
    return found


def _main(result: object) -> Tensor | None:
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping):
        parts = [result[key] for key in ("logits", "out") if key in result] or [*result.values()]
    elif isinstance(getattr(result, "logits", None), Tensor):
        parts = [getattr(result, "logits", None)]
    elif is_dataclass(result) and not isinstance(result, type):
        parts = [getattr(result, part.name) for part in fields(result)]
    else:
        parts = list(result) if isinstance(result, tuple | list) else []
    return next((found for found in map(_main, parts) if found is not None), None)


def require_parameters(model: nn.Module) -> None:
    """Raise `ModelError` for a model in which there is nothing to compress."""
    if next(model.parameters(), None) is None:
        raise ModelError(
            f"The model, a {type(model).__name__}, has no parameters, so that there is nothing to "
            "compress; is it the right one?"
        )


def same_outputs(before: Tensor, after: Tensor) -> bool:
    """Whether folding kept the outputs, within float32 rounding."""
    scale = before.abs().max().clamp_min(1e-12)
    return bool((before - after).abs().max() <= 1e-3 * scale)
