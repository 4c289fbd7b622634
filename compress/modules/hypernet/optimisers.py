"""The warning about optimisers that a conversion leaves behind."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from compress.modules.optimisers import optimisers_of


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
    lost = [named[name] for name in slots] if inplace else list(named.values())
    for optimiser, held in optimisers_of(lost):
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
