"""Finding optimisers that a conversion would leave behind."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer


def warn_of_optimisers(model: nn.Module, slots: Sequence[str], inplace: bool | None) -> None:
    """Warn of living optimisers that hold parameters which the converted model will not have.

    Such an optimiser goes on without an error and trains nothing.

    Args:
        model: The model before its conversion.
        slots: Names of the parameters that become slots.
        inplace: As for `hypernetize`: an explicit False says that a copy is meant, and nothing is
            looked for; None looks for any parameter of ``model``, True for those in ``slots``.
    """
    if inplace is False:
        return
    named = dict(model.named_parameters())
    lost = {id(named[name]) for name in slots} if inplace else {id(p) for p in named.values()}
    if not lost:
        return
    for optimiser in _living_optimisers():
        held = sum(id(p) in lost for group in optimiser.param_groups for p in group["params"])
        if not held:
            continue
        kind = type(optimiser).__name__
        if inplace:
            text = (
                f"The optimiser {kind} holds {held} parameters that become external; it will not "
                "train what gives their values. Make optimisers after hypernetize."
            )
        else:
            text = (
                f"The optimiser {kind} holds {held} parameters of the {type(model).__name__}, and "
                "hypernetize converts a copy, which it will not train. Make optimisers after "
                "hypernetize, pass inplace=True to convert the model itself as HyperLight does, "
                "or inplace=False if the copy is meant."
            )
        warnings.warn(text, UserWarning, stacklevel=4)


def _living_optimisers() -> list[Optimizer]:
    # Parameters do not know their optimisers and torch keeps no list; type() rather than
    # isinstance, which would run the code of proxy objects.
    return [o for o in gc.get_objects() if issubclass(type(o), Optimizer) and _is_complete(o)]


def _is_complete(optimiser: Optimizer) -> bool:
    return "param_groups" in vars(optimiser)
