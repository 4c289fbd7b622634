"""The warning about optimisers that a conversion leaves behind."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn

from compress.modules.optimisers import optimisers_of


def warn_of_optimisers(model: nn.Module, slots: Sequence[str]) -> None:
    """Warn of living optimisers that hold parameters which the model will not have.

    Such an optimiser goes on without an error and trains nothing.

    Args:
        model: The model before its conversion in place.
        slots: Names of the parameters that become slots.
    """
    named = dict(model.named_parameters())
    for optimiser, held in optimisers_of([named[name] for name in slots]):
        warnings.warn(
            f"The optimiser {type(optimiser).__name__} holds {held} parameters that become "
            "external; it will not train what gives their values. Make optimisers after "
            "hypernetize, or pass inplace=False to convert a copy.",
            UserWarning,
            stacklevel=4,
        )
