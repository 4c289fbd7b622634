"""Forgetting what a forward pass leaves on its modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Parameters, buffers, children and hooks: those have keepers of their own.
_TORCHS_OWN = frozenset(vars(nn.Module()))
_CONTAINERS = (list, dict, set)


@contextmanager
def kept_attributes(model: nn.Module) -> Iterator[None]:
    """Restore the plain attributes of every module when the block ends.

    A forward may keep an activation on its module (``self.features = x``), append to a list or
    count its calls. What it left would be copied with the model, and an activation with a gradient
    graph, or a proxy of `torch.fx`, cannot be.
    """
    saved = [(module, _plain(module)) for module in model.modules()]
    values = [value for _, attributes in saved for value in attributes.values()]
    contents = [(value, copy.copy(value)) for value in values if type(value) in _CONTAINERS]
    try:
        yield
    finally:
        for module, attributes in saved:
            for name in _plain(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
        for value, content in contents:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(content)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _TORCHS_OWN}
