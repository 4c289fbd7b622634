"""Specs, and the user's own code that they name.

The part after ``?`` holds the factory's arguments, ``&`` between them, each typed as a TOML value;
what is not a TOML value is a string, so that paths need no quotes.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

from compress.errors import InputError, near_matches, what_raised
from compress.untrusted import Unreadable, parse_toml
from compress.vision.torchvision import load_torchvision

T = TypeVar("T")

# What stands alone in front of a colon, in the forms that a spec may take.
_PREFIX = re.compile(r"(?<![\w./])\w+(?=:)")


# --- Specs and factories, for models and datasets alike ----------------------------------------


def split_spec(spec: str, error: type[InputError]) -> tuple[str, dict[str, Any]]:
    """Split ``head?key=value&key=value`` into the head and typed arguments.

    Raises:
        InputError: Of the type ``error``: an argument without ``=``, or given twice.
    """
    head, mark, query = spec.rpartition("?")
    if not mark:
        return spec, {}
    arguments: dict[str, Any] = {}
    for part in query.split("&"):
        key, equals, text = part.partition("=")
        if not equals or not key.isidentifier():
            raise error(
                f"The arguments of {spec!r} cannot be read at {part!r}; write them as "
                "?name=value&name=value."
            )
        if key in arguments:
            raise error(f"The argument {key!r} is given twice in {spec!r}.")
        arguments[key] = _toml_value(text)
    return head, arguments


def _toml_value(text: str) -> Any:
    try:
        values = parse_toml(f"value = {text}")
    except Unreadable:
        return text
    return values["value"] if len(values) == 1 else text


def import_function(spec: str, error: type[InputError]) -> Callable[..., Any]:
    """Import the function that ``package.module:function`` or ``path/file.py:function`` names.

    Raises:
        InputError: Of the type ``error``: no such file, module or function.
    """
    return _import_callable(spec, error, "package.module:function or path/to/file.py:function")[0]


def call_factory(
    head: str, arguments: dict[str, Any], error: type[InputError], forms: str
) -> object:
    """Import ``package.module:factory`` or ``path/to/file.py:factory`` and call it.

    The working folder, or the file's own, is on ``sys.path`` while that happens, so that what
    lies beside it can be imported.

    Args:
        head: The spec without its arguments.
        arguments: Keyword arguments of the factory.
        error: The exception type to raise.
        forms: The forms a spec may take, for the message.

    Raises:
        InputError: Of the type ``error``: no such file, module or factory, a factory that takes
            other arguments, or one that raises; the user's own exception is the cause.
    """
    factory, folder = _import_callable(head, error, forms)
    with _on_path(folder):
        return _call(factory, head, arguments, error)


def _import_callable(
    head: str, error: type[InputError], forms: str
) -> tuple[Callable[..., Any], Path]:
    """Import what a spec names; also return the folder that was on ``sys.path`` meanwhile."""
    place, colon, name = head.rpartition(":")
    if not colon or not place or not name:
        raise error(f"{head!r} is not a spec; write {forms}.")
    is_file = place.endswith(".py")
    folder = Path(place).absolute().parent if is_file else Path.cwd()
    with _on_path(folder):
        module = (
            _import_file(Path(place), error) if is_file else _import_module(place, error, forms)
        )
    found = getattr(module, name, None)
    if not callable(found) or isinstance(found, nn.Module):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        what = "no factory" if found is None else "no function or class"
        raise error(
            f"{place} has {what} {name!r}.{near_matches(name, known)} "
            f"It must be callable without a tensor and return what is asked for."
        )
    return found, folder


def _call(
    factory: Callable[..., object], head: str, arguments: dict[str, Any], error: type[InputError]
) -> object:
    try:
        signature = inspect.signature(factory)
        signature.bind(**arguments)
    except TypeError as problem:
        known = list(signature.parameters)
        wrong = [near_matches(a, known) for a in arguments if a not in known]
        raise error(
            f"The factory {head} cannot be called with {arguments or 'no arguments'}: {problem}."
            f"{''.join(wrong)} It takes {signature}."
        ) from problem
    except ValueError:
        pass  # a builtin without a signature: the call itself will tell
    try:
        return _with_torchvision(lambda: factory(**arguments))
    except KeyboardInterrupt:
        raise
    except BaseException as problem:  # SystemExit, and whatever else the user's code raises
        raise error(f"The factory {head} raised {what_raised(problem)}.") from problem


def _with_torchvision(run: Callable[[], T]) -> T:
    """Run the user's code; again where its import of torchvision failed for lack of operators."""
    try:
        return run()
    except RuntimeError as problem:
        if "operator torchvision::" not in str(problem):
            raise
    load_torchvision()
    return run()


def _import_file(path: Path, error: type[InputError]) -> ModuleType:
    """Import a file under a name of its own, so that it shadows nothing; once while unchanged."""
    try:
        source = path.read_bytes()
    except OSError as problem:
        around = path.parent.glob("*.py") if path.parent.is_dir() else ()
        raise error(
            f"The file {path} cannot be read: {problem.strerror}."
            f"{near_matches(path.name, [p.name for p in around])} "
            f"Paths are relative to {Path.cwd()}."
        ) from problem
    key = os.fsencode(path.absolute()) + b"\0" + source
    name = f"_compress_user_{path.stem}_{hashlib.sha256(key).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path.absolute())
    if found is None or found.loader is None:
        raise error(f"The file {path} cannot be imported; it must be a Python source file.")
    loader, module = found.loader, importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    try:
        _with_torchvision(lambda: loader.exec_module(module))
    except KeyboardInterrupt:
        raise
    except BaseException as problem:  # SystemExit, and whatever else the user's code raises
        del sys.modules[name]
        raise error(f"Importing {path} raised {what_raised(problem)}.") from problem
    return module


def _import_module(name: str, error: type[InputError], forms: str) -> ModuleType:
    try:
        return _with_torchvision(lambda: importlib.import_module(name))
    except ModuleNotFoundError as problem:
        if problem.name is None or not (name + ".").startswith(problem.name + "."):
            raise error(f"Importing {name} raised {what_raised(problem)}.") from problem
        near = near_matches(name.partition(".")[0], _PREFIX.findall(forms))
        raise error(
            f"There is no module {problem.name!r} to import, neither installed nor in "
            f"{Path.cwd()}.{near} A spec is {forms}."
        ) from problem
    except KeyboardInterrupt:
        raise
    except BaseException as problem:  # SystemExit, and whatever else the user's code raises
        raise error(f"Importing {name} raised {what_raised(problem)}.") from problem


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)
