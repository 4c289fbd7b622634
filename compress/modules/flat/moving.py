"""State dicts of torchreparam's ReparamModule, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compress.modules.flat.module import FlatModule


def from_reparam_state_dict(state_dict: Mapping[str, Any], flat: FlatModule) -> dict[str, Any]:
    """Return a state dict of a ReparamModule as ``flat``, which wraps the same module, loads it.

    The two have the same entries, but a traced ReparamModule repeats them, and one whose module has
    frozen parameters holds those in the vector alone.

    Args:
        state_dict: Of the ReparamModule: ``flat_param`` and ``module.<buffer>``.
        flat: Says which parameters are frozen.

    Raises:
        ValueError: No vector of ``flat``'s length.
    """
    vector = state_dict.get("flat_param")
    if not isinstance(vector, Tensor):
        raise ValueError("The state dict has no flat_param; it is not one of a ReparamModule.")
    parts = flat.unflatten(vector)
    found = {k: v for k, v in state_dict.items() if not k.startswith("_traced_self.")}
    for name in flat.frozen_names:
        found.setdefault(f"module.{name}", parts[name].clone())
    return found


def to_reparam_state_dict(flat: FlatModule) -> dict[str, Any]:
    """Return the state of ``flat`` as a ReparamModule around the same module loads it."""
    state = flat.state_dict()
    vector = state.pop("flat_param").clone()
    for name, part in flat.unflatten(vector).items():
        if name in flat.frozen_names:
            part.copy_(state[f"module.{name}"])
    parameters = {
        f"module.{name}" for name, _ in flat.module.named_parameters(remove_duplicate=False)
    }
    rest = {name: value for name, value in state.items() if name not in parameters}
    return {"flat_param": vector, **rest}
