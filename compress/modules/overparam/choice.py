"""Which layers a conversion takes, and what it leaves behind."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from compress.modules.optimisers import optimisers_of
from compress.modules.overparam.layer import OverparamLayer

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


def matches(names: Iterable[str], include: Collection[str], exclude: Collection[str]) -> bool:
    """Whether a module of these names is included by some glob and excluded by none."""
    names = list(names)
    return any(fnmatchcase(n, p) for n in names for p in include) and not any(
        fnmatchcase(n, p) for n in names for p in exclude
    )


def warn_of_others(
    model: nn.Module,
    kinds: tuple[type[nn.Module], ...],
    ignored: Collection[int],
    include: Collection[str],
    exclude: Collection[str],
) -> None:
    """Warn of layers that are meant but not converted, as they may compute something else.

    Args:
        model: The model.
        kinds: Classes to convert.
        ignored: Ids of modules that the user keeps.
        include: Globs of names to convert.
        exclude: Globs of names to keep.
    """
    chains = [m for m in model.modules() if isinstance(m, OverparamLayer)]
    inside = {id(part) for chain in chains for part in chain.modules()}
    found = []
    for name, module in model.named_modules():
        plain = type(module) in kinds and "weight" in module._parameters
        if not isinstance(module, kinds) or plain or id(module) in inside:
            continue
        if id(module) not in ignored and matches([name], include, exclude):
            what = "computed weight" if type(module) in kinds else type(module).__name__
            found.append(f"{name or 'the model'} ({what})")
    if found:
        named = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        warnings.warn(
            f"Kept as they are, since they may compute something else than their base class: "
            f"{named}. List them in ignore to say that this is meant.",
            UserWarning,
            stacklevel=3,
        )


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
