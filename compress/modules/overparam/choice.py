"""Which layers a conversion takes, and what it leaves behind."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from torch import nn

from compress.modules.optimisers import optimisers_of

_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "all": (nn.Linear, nn.Conv2d),
    "conv": (nn.Conv2d,),
    "fc": (nn.Linear,),
}


def chosen_kinds(overparam: str) -> tuple[type[nn.Module], ...]:
    """Return the classes to convert.

    Raises:
        ValueError: Neither "all" nor "conv" nor "fc".
    """
    if overparam not in _KINDS:
        raise ValueError(
            f"overparam={overparam!r} is unknown; it is {', '.join(map(repr, _KINDS))}."
        )
    return _KINDS[overparam]


def below(model: nn.Module, ignore: Iterable[nn.Module]) -> set[int]:
    """Return the ids of the modules to ignore and of everything below them.

    Raises:
        TypeError: Something that is not a module (a name, which ``exclude`` takes).
        ValueError: A module that is not in ``model``.
    """
    own = {id(m) for m in model.modules()}
    found: set[int] = set()
    for module in [ignore] if isinstance(ignore, nn.Module) else ignore:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"ignore takes modules of the model, not {module!r}; exclude takes names."
            )
        if id(module) not in own:
            raise ValueError(f"ignore has a {type(module).__name__} that is not in the model.")
        found |= {id(m) for m in module.modules()}
    return found


def warn_of_optimisers(before: Mapping[int, nn.Parameter], converted: nn.Module) -> None:
    """Warn if a living optimiser holds a parameter that ``converted`` no longer has.

    Args:
        before: The parameters before the conversion, by id; holding them keeps ids from being
            given to new ones.
        converted: The model afterwards.
    """
    left = {id(p) for p in converted.parameters()}
    gone = [p for key, p in before.items() if key not in left]
    count = max((held for _, held in optimisers_of(gone)), default=0)
    if count:
        warnings.warn(
            f"An optimiser made before the conversion holds {count} parameters of layers that are "
            "replaced now; it would not train the new ones. Make the optimiser afterwards.",
            UserWarning,
            stacklevel=3,
        )
