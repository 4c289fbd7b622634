"""Modules by their qualified names."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def module_names(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """All qualified names of every module, shared ones with several."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    return {module: tuple(listed) for module, listed in names.items()}


def is_hooked(module: nn.Module) -> bool:
    """Whether a module carries forward hooks, which one in its place would not."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, by qualified name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def swapped(
    model: nn.Module, replacements: Mapping[str, nn.Module]
) -> Iterator[dict[str, nn.Module]]:
    """Put modules in the places of others for a while.

    Args:
        model: The model, as it was again when the block is left.
        replacements: By qualified name; a shared module is named by each of its names.

    Yields:
        The modules that stood there before, by name.
    """
    before = {name: model.get_submodule(name) for name in replacements}
    try:
        for name, module in replacements.items():
            replace_module(model, name, module)
        yield before
    finally:
        for name, module in before.items():
            replace_module(model, name, module)


def cast(model: ModuleT, dtype: torch.dtype) -> ModuleT:
    """Convert a model's real numbers in place; ``nn.Module.to`` makes complex ones real too."""
    model._apply(  # type: ignore[no-untyped-call]
        lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
    )
    return model


def dtype_of(tensors: Iterable[Tensor]) -> torch.dtype:
    """The floating type that holds most of some tensors' numbers; of equals, the one met first.

    Returns:
        ``torch.float32`` where none is floating.
    """
    numbers: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.is_floating_point():
            numbers[tensor.dtype] += tensor.numel()
    return numbers.most_common(1)[0][0] if numbers else torch.float32
