"""Finding the optimisers that a conversion would leave behind."""

from __future__ import annotations

import gc
from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer


def optimisers_of(parameters: Iterable[nn.Parameter]) -> list[tuple[Optimizer, int]]:
    """Return the living optimisers that hold some of these parameters, and how many of them.

    Parameters do not know their optimisers, and torch keeps no list of these; the garbage
    collector knows every object that refers to others.
    """
    wanted = {id(p): p for p in parameters}
    # Looking for what refers to the parameters is several times quicker than looking at every
    # object, and mostly finds that no parameter group does.
    lists = [r for r in gc.get_referrers(*wanted.values()) if type(r) is list]
    groups = [r for r in gc.get_referrers(*lists) if type(r) is dict and "params" in r]
    if not lists or not groups:
        return []
    found = []
    for optimiser in _living_optimisers():
        held = sum(id(p) in wanted for group in optimiser.param_groups for p in group["params"])
        if held:
            found.append((optimiser, held))
    return found


def _living_optimisers() -> list[Optimizer]:
    # type() rather than isinstance, which would run the code of proxy objects. One whose
    # constructor failed may be living too, without groups.
    return [
        o for o in gc.get_objects() if issubclass(type(o), Optimizer) and "param_groups" in vars(o)
    ]
