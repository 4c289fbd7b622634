"""Modules by their qualified names."""

from __future__ import annotations

from collections import defaultdict

from torch import nn


def module_names(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """All qualified names of every module, shared ones with several."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    return {module: tuple(listed) for module, listed in names.items()}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, by qualified name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
