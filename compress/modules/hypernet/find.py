"""Finding modules and parameters of a model by type, glob or regular expression."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

Patterns = str | Sequence[str]
Found = TypeVar("Found")


def find_modules_of_type(
    model: nn.Module, module_types: type[nn.Module] | Iterable[type[nn.Module]]
) -> OrderedDict[str, nn.Module]:
    """Return the modules of given types, subclasses included, by dotted name in model order.

    Raises:
        TypeError: A type that is not a module class.
    """
    _check_model(model)
    types = (module_types,) if isinstance(module_types, type) else tuple(module_types)
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"find_modules_of_type takes nn.Module classes, not {kind!r}.")
    return OrderedDict(
        (name, module) for name, module in model.named_modules() if isinstance(module, types)
    )


def find_modules_from_patterns(
    model: nn.Module, globs: Patterns | None = None, regex: Patterns | None = None
) -> OrderedDict[str, nn.Module]:
    """Return the modules whose dotted name matches, in model order, each once; never the root.

    Args:
        model: Where to look.
        globs: Shell-style patterns of whole names, as ``*.conv1``.
        regex: Regular expressions found anywhere in the name, as ``layer[1-3].*conv``.

    Raises:
        ValueError: No pattern, or a regular expression that is none.
    """
    _check_model(model)
    matches = _matcher(globs, regex)
    return _first(model.named_modules(remove_duplicate=False), lambda n: bool(n) and matches(n))


def find_parameters_from_patterns(
    model: nn.Module, globs: Patterns | None = None, regex: Patterns | None = None
) -> OrderedDict[str, nn.Parameter]:
    """Return the parameters whose dotted name matches, in model order, tied ones once.

    Raises:
        ValueError: No pattern, or a regular expression that is none.
    """
    _check_model(model)
    return _first(model.named_parameters(remove_duplicate=False), _matcher(globs, regex))


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model must be an nn.Module, not a {type(model).__name__}.")


def _matcher(globs: Patterns | None, regex: Patterns | None) -> Callable[[str], bool]:
    if globs is None and regex is None:
        raise ValueError("Give globs or regex, or both, to say what to find.")
    shell = (globs,) if isinstance(globs, str) else tuple(globs or ())
    expressions = []
    for pattern in (regex,) if isinstance(regex, str) else tuple(regex or ()):
        try:
            expressions.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}.") from error
    return lambda name: (
        any(fnmatchcase(name, pattern) for pattern in shell)
        or any(expression.search(name) for expression in expressions)
    )


def _first(
    named: Iterator[tuple[str, Found]], matches: Callable[[str], bool]
) -> OrderedDict[str, Found]:
    found: OrderedDict[str, Found] = OrderedDict()
    seen: set[int] = set()
    for name, item in named:
        if id(item) not in seen and matches(name):
            seen.add(id(item))
            found[name] = item
    return found
