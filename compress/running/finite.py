"""Saying where in a model NaN or infinite values begin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.running.forward import ForwardHook, evaluation_mode, forward_hooks, run_model
from compress.running.structure import floating


def not_finite(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of the tensors that hold NaN or infinite values, in their order.

    Masks are passed over: infinities beside a single other value, as attention adds them.
    """
    return tuple(
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not _finite_or_mask(_widened(tensor))
    )


def _finite_or_mask(tensor: Tensor) -> bool:
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return True
    rest = tensor[finite]
    return bool(rest.numel()) and not bool(tensor.isnan().any()) and bool((rest == rest[0]).all())


def _widened(tensor: Tensor) -> Tensor:
    """The narrowest types do not know what is finite."""
    return tensor.float() if tensor.itemsize < 4 else tensor


def check_finite(model: nn.Module, inputs: Any, result: Any, when: str, remedy: str) -> None:
    """Check that a model's outputs are finite.

    Args:
        model: The model; run once more where they are not, to find the layer.
        inputs: What it was run on.
        result: What it returned.
        when: On which images, or after what, such as ``"on the first image"``.
        remedy: What to do about it.

    Raises:
        ModelError: They are not. The module that gave the first such value is named.
    """
    if all(bool(torch.isfinite(output).all()) for output in floating(result).values()):
        return
    name = _first_broken(model, inputs)
    where = f"; they begin in {name}" if name else ", which no module of it gave"
    raise ModelError(f"The model gives NaN or infinite outputs {when}{where}; {remedy}.")


def _first_broken(model: nn.Module, inputs: Any) -> str:
    """The innermost module whose output is the first that is not finite; ``""`` for none."""
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> ForwardHook:
        def hook(_: nn.Module, __: object, output: object) -> None:
            broken = isinstance(output, Tensor) and not bool(torch.isfinite(output).all())
            if broken and not found:
                found.append(f"{name!r} ({type(module).__name__})")

        return hook

    # Hooks of children fire before those of their parents, which so name the rest of a forward.
    hooks = {module: watch(name, module) for name, module in model.named_modules() if name}
    with torch.no_grad(), evaluation_mode(model), forward_hooks(hooks):
        run_model(model, inputs)
    return found[0] if found else ""
