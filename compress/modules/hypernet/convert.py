"""`hypernetize`: turn chosen parameters of any model into slots."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from compress.errors import near_matches
from compress.modules.hypernet.external import HyperModule
from compress.modules.hypernet.optimisers import warn_of_optimisers
from compress.modules.hypernet.slot import ExternalParameter

Modules = nn.Module | Iterable[nn.Module | str] | Mapping[str, nn.Module]
Parameters = Tensor | Iterable[Tensor | str] | Mapping[str, Tensor]
ALL = "all"


@overload
def hypernetize(
    model: nn.Module,
    modules: Modules | None = ...,
    parameters: Parameters | None = ...,
    *,
    return_values: Literal[False] = ...,
    inplace: bool = ...,
) -> HyperModule: ...


@overload
def hypernetize(
    model: nn.Module,
    modules: Modules | None = ...,
    parameters: Parameters | None = ...,
    *,
    return_values: Literal[True],
    inplace: bool = ...,
) -> tuple[HyperModule, dict[str, Tensor]]: ...


def hypernetize(
    model: nn.Module,
    modules: Modules | None = None,
    parameters: Parameters | None = None,
    *,
    return_values: bool = False,
    inplace: bool = True,
) -> HyperModule | tuple[HyperModule, dict[str, Tensor]]:
    """Turn the parameters of chosen modules, and chosen parameters, into slots.

    The modules that hold them, and the model itself, become `HyperModule` as subclasses of their
    own classes (``HypernetizedConv2d``). Modules in several places and tied parameters keep one
    slot.

    Args:
        model: Any model, or one layer.
        modules: Modules of the model, or their dotted names, as a list or a finder's dict; all
            parameters below them are taken.
        parameters: Parameters of the model, or their dotted names; ``"all"`` takes all of them. So
            does giving neither ``modules`` nor ``parameters``, with a warning.
        return_values: Whether to return the values too.
        inplace: Change ``model`` itself, as HyperLight does, or a copy (False).

    Returns:
        The model, or the model and the values that its slots had, by dotted name; with those put
        back its output is what it was.

    Raises:
        ValueError: Something that is not in the model, not initialised yet, or cannot be changed.
        TypeError: ``model`` is not a module.

    Warns:
        UserWarning: Where HyperLight would do something else or training would have no effect: a
            module object (not a name) with parameters in submodules that were not chosen, whose
            own parameters alone HyperLight takes; neither ``modules`` nor ``parameters``, with
            which HyperLight takes none; an existing optimiser that holds what becomes a slot,
            which it will not train.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"hypernetize takes an nn.Module, not a {type(model).__name__}.")
    # Once, for callers that pass iterators.
    modules = None if modules is None else _items(modules, nn.Module)
    if parameters is not None:
        everything = dict(model.named_parameters())
        parameters = _items(everything if _is_all(parameters) else parameters, Tensor)
    names = _chosen_names(model, modules, parameters)
    _check_kinds(model, names)
    _warn_of_differences(model, modules, parameters)
    if inplace:
        warn_of_optimisers(model, names)
    target = model if inplace else copy.deepcopy(model)
    named = dict(target.named_parameters())
    slots: dict[int, ExternalParameter] = {}
    for name in names:
        slot = ExternalParameter(named[name].shape, dtype=named[name].dtype)
        slot.name = name
        slots[id(named[name])] = slot
    values = {name: named[name].detach() for name in names}
    for module in target.modules():
        own = {leaf: slots[id(p)] for leaf, p in module._parameters.items() if id(p) in slots}
        if own or module is target:
            _make_hyper(module)
        if isinstance(module, HyperModule):
            for leaf, slot in own.items():
                del module._parameters[leaf]
                module._external_parameters[leaf] = slot
    assert isinstance(target, HyperModule)
    return (target, values) if return_values else target


def hypernetize_single(
    module: nn.Module,
    parameters: Iterable[Tensor | str] | None = None,
    *,
    return_values: bool = False,
    return_parameters: bool = False,
    inplace: bool = True,
) -> HyperModule | tuple[HyperModule, dict[str, Tensor]]:
    """Turn parameters of one module into slots; its submodules stay as they are.

    Args:
        module: The module.
        parameters: Its own parameters, or their names; ``"all"`` takes all of its own. So does
            None, with a warning, since HyperLight then takes none.
        return_values: Whether to return the values too.
        return_parameters: The same as ``return_values``, as HyperLight calls it.
        inplace: As for `hypernetize`.

    Returns:
        As `hypernetize`.

    Raises:
        ValueError: No such parameter of its own.
    """
    own = {name: p for name, p in module._parameters.items() if p is not None}
    names = {id(p): name for name, p in own.items()}
    if parameters is None:
        warnings.warn(
            f"hypernetize_single without parameters takes all {len(own)} of the "
            f"{type(module).__name__}'s own, where HyperLight takes none. Pass parameters='all' to "
            "take all, or name what to take.",
            UserWarning,
            stacklevel=2,
        )
    everything = parameters is None or _is_all(parameters)
    wanted: list[Any] = list(own) if everything else _items(parameters, Tensor)
    for index, name in enumerate(wanted):
        if id(name) in names:
            name = wanted[index] = names[id(name)]
        if isinstance(name, Tensor):
            raise ValueError(
                f"This {type(name).__name__} of shape {tuple(name.shape)} is not a parameter of "
                f"the {type(module).__name__} itself."
            )
        if name not in own:
            raise ValueError(
                f"{type(module).__name__} has no parameter {name!r} of its own."
                f"{near_matches(str(name), own)}"
            )
    if return_values or return_parameters:
        return hypernetize(module, parameters=wanted, return_values=True, inplace=inplace)
    return hypernetize(module, parameters=wanted, inplace=inplace)


def _chosen_names(
    model: nn.Module, modules: Modules | None, parameters: Parameters | None
) -> list[str]:
    """First names of the chosen parameters, in model order."""
    first = {id(p): name for name, p in model.named_parameters()}
    if modules is None and parameters is None:
        return list(first.values())
    kind = type(model).__name__
    chosen: set[int] = set()
    inside = {id(m) for m in model.modules()}
    by_name = dict(model.named_modules(remove_duplicate=False))
    for item in _items(modules, nn.Module):
        if isinstance(item, str):
            if item not in by_name:
                raise ValueError(f"{kind} has no module {item!r}.{near_matches(item, by_name)}")
            item = by_name[item]
        if not isinstance(item, nn.Module) or id(item) not in inside:
            raise ValueError(f"This {type(item).__name__} is not a module of the {kind}.")
        chosen |= {id(p) for p in item.parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    for item in _items(parameters, Tensor):
        if isinstance(item, str):
            if item not in every:
                raise ValueError(f"{kind} has no parameter {item!r}.{near_matches(item, every)}")
            item = every[item]
        if id(item) not in first:
            shape = f" of shape {tuple(item.shape)}" if isinstance(item, Tensor) else ""
            raise ValueError(f"This {type(item).__name__}{shape} is not a parameter of the {kind}.")
        chosen.add(id(item))
    return [name for key, name in first.items() if key in chosen]


def _is_all(parameters: Any) -> bool:
    return isinstance(parameters, str) and parameters == ALL


def _count(model: nn.Module) -> int:
    return sum(1 for _ in model.parameters())


def _items(given: Any, single: type) -> list[Any]:
    if given is None:
        return []
    # A ModuleDict or ModuleList is one module, though it can be iterated.
    if isinstance(given, str | single):
        return [given]
    return list(given.values()) if isinstance(given, Mapping) else list(given)


def _warn_of_differences(
    model: nn.Module, modules: Modules | None, parameters: Parameters | None
) -> None:
    """Warn where the same call of HyperLight takes other parameters."""
    if modules is None and parameters is None:
        warnings.warn(
            f"hypernetize with neither modules nor parameters takes all {_count(model)} parameters "
            f"of the {type(model).__name__}, where HyperLight takes none. Pass parameters='all' to "
            "take all, modules=[] to take none, or name what to take.",
            UserWarning,
            stacklevel=3,
        )
        return
    given = _items(modules, nn.Module)
    objects = [module for module in given if isinstance(module, nn.Module)]
    by_name = [model.get_submodule(name) for name in given if isinstance(name, str)]
    every = dict(model.named_parameters(remove_duplicate=False))
    alone = [every[p] if isinstance(p, str) else p for p in _items(parameters, Tensor)]
    chosen = {id(p) for p in (*alone, *(p for m in by_name for p in m.parameters()))}
    chosen |= {id(p) for m in objects for p in m._parameters.values() if p is not None}
    for module in objects:
        more = [name for name, p in module.named_parameters() if id(p) not in chosen]
        if more:
            warnings.warn(
                f"The chosen {type(module).__name__} has {len(more)} parameters in its submodules "
                f"({more[0]}, ...), which hypernetize takes too and HyperLight leaves; pass the "
                "module's dotted name for all of them, or the submodules themselves.",
                UserWarning,
                stacklevel=3,
            )


def _check_kinds(model: nn.Module, names: list[str]) -> None:
    named = dict(model.named_parameters())
    for name in names:
        if isinstance(named[name], UninitializedParameter):
            raise ValueError(
                f"The parameter {name!r} of the {type(model).__name__} is lazy and has no shape "
                "yet; run a forward before hypernetize."
            )
    taken = {id(named[name]) for name in names}
    for path, module in model.named_modules():
        holds = any(id(p) in taken for p in module._parameters.values())
        if (holds or module is model) and isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"The module {path or 'root'!r} is a {type(module).__name__}, compiled code whose "
                "parameters cannot become external; hypernetize the Python module instead."
            )


def _make_hyper(module: nn.Module) -> None:
    """Turn a module into a `HyperModule` where it is, so that all references to it stay."""
    if isinstance(module, HyperModule):
        return
    module.__dict__["_external_parameters"] = {}
    kind: Any = type(module)
    module.__class__ = hyper_class(kind)


@functools.cache
def hyper_class(kind: Any) -> type[nn.Module]:
    """Return the subclass of `HyperModule` and the module class ``kind``, always the same one."""

    def reduce(self: Any, protocol: Any) -> Any:
        del protocol  # the class is made at run time, so pickle is told how to find it
        return _revive, (kind,), self.__getstate__()

    return type(
        f"Hypernetized{kind.__name__}",
        (HyperModule, kind),
        {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce_ex__": reduce},
    )


def _revive(kind: Any) -> nn.Module:
    cls = hyper_class(kind)
    return cls.__new__(cls)
