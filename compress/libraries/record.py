"""What a library of networks is to this package, and what the optional ones have in common."""

from __future__ import annotations

import importlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

from compress.errors import ModelError, one_line
from compress.vision.preprocessing import Preprocessing
from compress.vision.torchvision import load_torchvision

# The largest networks of any library have some thousand modules.
MOST_MODULES = 20_000
# What a file of somebody else's may pass: small lists of words and numbers, no paths, no addresses.
_WORD = re.compile(r"[\w.+-]{1,60}", re.ASCII)
_LARGEST_NUMBER = 1_000_000
_LONGEST_LIST = 16


Convert = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class FromLibrary:
    """A network that a library built.

    Attributes:
        module: The network, with random weights or with its own.
        preset: How its pictures are prepared, where the library knows.
        input_shape: One input without the batch axis, ``(C, H, W)``, where the library knows.
        convert: From the entries of a checkpoint to those of the network, where the library has
            renamed its layers since checkpoints were published. What it does not know it leaves.
    """

    module: nn.Module
    preset: Preprocessing | None = None
    input_shape: tuple[int, ...] | None = None
    convert: Convert | None = None


def plain_arguments(arguments: Mapping[str, Any]) -> str:
    """Say which arguments are more than words, small numbers and short lists; ``""`` for none."""
    reaching = {k: v for k, v in arguments.items() if not _is_plain(v)}
    return f"passes {reaching}" if reaching else ""


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= _LONGEST_LIST and all(
            not isinstance(v, list) and _is_plain(v) for v in value
        )
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    return isinstance(value, bool | int | float) and abs(value) <= _LARGEST_NUMBER


def _reads_nothing(_: str) -> tuple[Path, ...]:
    return ()


@dataclass(frozen=True)
class Library:
    """A library of networks.

    Attributes:
        prefix: What its specs begin with, in front of the colon.
        example: A spec.
        build: From a name and arguments to a network, by the installed code alone.

            Raises `ModelError` for whatever cannot be built.
        risk: What a file of somebody else's must not ask for by such arguments, to be read after
            "The result"; ``""`` where building is harmless.
        sized_by_arguments: Whether arguments decide how large a network becomes. Where a file
            decides it, `build` compares the two itself.
        place: The file or folder that a name stands for; ``""`` where it is no path.
        checkpoint: Where the weights of a name lie; ``""`` where only the user knows.
        files: The files that hold the weights, where these come with the network.
        brings_weights: Whether the built network has its trained weights already.
    """

    prefix: str
    example: str
    build: Callable[[str, dict[str, Any]], FromLibrary]
    risk: Callable[[Mapping[str, Any]], str] = plain_arguments
    sized_by_arguments: bool = True
    place: Callable[[str], str] = lambda _: ""
    checkpoint: Callable[[str], str] = lambda _: ""
    files: Callable[[str], tuple[Path, ...]] = _reads_nothing
    brings_weights: bool = False


def require(package: str, extra: str, user: str) -> Any:
    """Import an optional package.

    Args:
        package: Its name.
        extra: The extra of this package that installs it.
        user: What needs it, such as ``"Models of timm:"``.

    Raises:
        ModelError: It is not installed, or cannot be imported.
    """
    try:
        with quiet():
            load_torchvision()  # which all of them import in their own time, and it may need help
            return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{user} need the package {error.name}, which is not installed; install "
            f"it with pip install 'compress[{extra}]'."
        ) from error
    except Exception as error:  # whatever a package does while it is imported
        raise ModelError(
            f"{user} need the package {package}, and importing it raised "
            f"{type(error).__name__}: {one_line(error)}. Install it anew with pip install "
            f"--upgrade 'compress[{extra}]'."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep a library's own warnings and logs to itself; what matters to the user raises."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _ShortLinesOnCpu(TorchFunctionMode):
    """Leaves evenly spaced numbers on the CPU, whose values decide how a network is built."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Put the result of `torch.linspace` on the CPU."""
        del types
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            steps = kwargs.get("steps", args[2] if len(args) > 2 else 0)
            if steps > _LARGEST_NUMBER:
                raise ValueError(f"a network of {steps:,} steps is refused")
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """Build a network of few modules whose tensors have shapes and no values.

    Raises:
        ValueError: As `few_modules`.
    """
    with few_modules(), torch.device("meta"), _ShortLinesOnCpu():
        yield


@contextmanager
def few_modules() -> Iterator[None]:
    """Refuse a network of very many layers while it is being built.

    Raises:
        ValueError: It has more than `MOST_MODULES`.
    """
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MOST_MODULES:
            raise ValueError(f"a network of more than {MOST_MODULES:,} modules is refused")

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()
