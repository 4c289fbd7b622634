"""State dicts of the authors' overparam layers, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compress.modules.overparam.layer import OverparamLayer

# <layer>.layer_dict.<sublayer>.<0: the layer, 1: its BatchNorm>.<tensor>
_THEIRS = re.compile(r"(?P<layer>(?:.*\.)?)layer_dict\.(?P<i>\d+)\.(?P<part>[01])\.(?P<leaf>\w+)")
_OURS = re.compile(r"(?P<layer>(?:.*\.)?)(?P<part>layers|norms)\.(?P<i>\d+)\.(?P<leaf>\w+)")


def from_overparam_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict of a model with the authors' layers under our names.

    The collapsed ``weight`` and ``bias`` that their layers store are left out: they are computed.
    Entries of other modules stay as they are.

    Args:
        state_dict: Of one of their layers, or of a model with such layers anywhere.
    """
    found: dict[str, Any] = {}
    collapsed: set[str] = set()
    for name, value in state_dict.items():
        match = _THEIRS.fullmatch(name)
        if match is None:
            found[name] = value
            continue
        layer, i, part, leaf = match.group("layer", "i", "part", "leaf")
        collapsed |= {f"{layer}weight", f"{layer}bias"}
        found[f"{layer}{('layers', 'norms')[int(part)]}.{i}.{leaf}"] = value
    return {name: value for name, value in found.items() if name not in collapsed}


def to_overparam_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the state of a model with our layers under the authors' names.

    Args:
        model: One of our layers, or a model with such layers anywhere.

    Returns:
        The state dict that the authors' layers of the same options load, the collapsed ``weight``
        and ``bias`` (zero where there is none, as theirs begins) included.
    """
    state = model.state_dict()
    found: dict[str, Any] = {}
    chains = {
        f"{name}." if name else "": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, OverparamLayer)
    }
    for name, value in state.items():
        match = _OURS.fullmatch(name)
        if match is None or match["layer"] not in chains:
            found[name] = value
            continue
        part = 0 if match["part"] == "layers" else 1
        found[f"{match['layer']}layer_dict.{match['i']}.{part}.{match['leaf']}"] = value
    with torch.no_grad():
        for prefix, chain in chains.items():
            chain.forget()
            weight, bias = chain.effective()
            found[f"{prefix}weight"] = weight.clone()
            found[f"{prefix}bias"] = weight.new_zeros(len(weight)) if bias is None else bias.clone()
    return found
