"""Runtimes that a network may be timed on, each with how it takes a network and a single layer."""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.config import COMPILE, TORCH
from compress.deploy.compiled import require_compiler
from compress.deploy.file import load_to_be_timed
from compress.deploy.layers import INPUT, layer_file
from compress.deploy.onnx import EXTRA, NEEDED_BY
from compress.deploy.runtimes import SESSIONS, OnRuntime, installed
from compress.errors import ConfigError, ModelError, one_line
from compress.libraries.record import quiet, require
from compress.running.memory_format import evaluating, in_memory_format
from compress.running.structure import arguments, cloned, count

_EXTRAS = {"onnxruntime": EXTRA, "openvino": "openvino"}
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_counter = itertools.count()


@dataclass(frozen=True)
class Engine:
    """Torch, in the eager mode that everything else here runs in too.

    Attributes:
        name: One of `compress.config.RUNTIMES`.
        version: The package's.
    """

    name: str = TORCH
    version: str = torch.__version__

    @property
    def described(self) -> str:
        """Name and version, what a time is valid for."""
        return f"{self.name} {self.version}"

    def formats(self, of_network: Sequence[str]) -> tuple[str, ...]:
        """The memory formats to time a network in; other runtimes choose layouts by themselves."""
        return tuple(of_network) if self.name == TORCH else ("contiguous",)

    def network(self, model: nn.Module, batches: Sequence[Any]) -> nn.Module:
        """Return a network as the runtime runs it.

        Args:
            model: The network in eval mode; it is left as it was.
            batches: One of each size that it will be timed at.

        Raises:
            ModelError: The runtime does not take it.
        """
        del batches
        return model

    def layer(self, layer: nn.Module, example: Tensor) -> nn.Module:
        """Return a single layer, or a chain, as the runtime runs it on a batch of such inputs."""
        return self.network(layer, [example])


@dataclass(frozen=True)
class _Compiling(Engine):
    """``torch.compile``. Layers are timed as they are: compiled, they call the same kernels."""

    def network(self, model: nn.Module, batches: Sequence[Any]) -> nn.Module:
        """Compile a network for batches of these sizes."""
        return _Compiled(model, batches)

    def layer(self, layer: nn.Module, example: Tensor) -> nn.Module:
        """Return the layer itself."""
        del example
        return layer


@dataclass(frozen=True)
class _Exporting(Engine):
    """A runtime that loads ONNX files."""

    def network(self, model: nn.Module, batches: Sequence[Any]) -> nn.Module:
        """Export a network and load it."""
        networks, problems = exported(model, batches, [self.name])
        if self.name not in networks:
            raise ModelError(" ".join(problems))
        return networks[self.name]

    def layer(self, layer: nn.Module, example: Tensor) -> nn.Module:
        """Load the layer's own file; one of an unusual kind is exported."""
        content = layer_file(layer, example.shape)
        if content is None:
            return self.network(layer, [example])
        reference = next(layer.parameters())
        return OnRuntime(SESSIONS[self.name](content), (INPUT,), example, reference)


class _Compiled(nn.Module):
    """A network that `torch.compile` has compiled for some batch sizes.

    Raises:
        ModelError: It cannot be compiled.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        super().__init__()
        self.model = model

        def call(*by_position: Any, **by_name: Any) -> Any:
            return model(*by_position, **by_name)

        # torch remembers what it compiled by the code object, and gives up on one that it has
        # compiled too often: each network has a code object of its own.
        call.__code__ = call.__code__.replace(co_name=f"compiled_{next(_counter)}")
        self.call = torch.compile(call, dynamic=False)
        # Made outside of inference mode, as those are that it will be timed with: what is made in
        # it counts as another kind of tensor, and would be compiled for anew.
        given = [arguments(cloned(batch)) for batch in batches]
        try:
            with quiet(), evaluating([self]):
                for by_position, by_name in given:
                    self(*by_position, **by_name)
        except Exception as error:  # of dynamo, of inductor, of the C++ compiler
            raise ModelError(
                f"torch.compile cannot compile the network: {type(error).__name__}: "
                f"{one_line(error)[:300]}. Choose another --runtime."
            ) from error

    def forward(self, *by_position: Any, **by_name: Any) -> Any:
        """Run the compiled network."""
        return self.call(*by_position, **by_name)


class _ByBatch(nn.Module):
    """A network whose forward is bound to a batch size, once for each size."""

    def __init__(self, networks: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({str(size): each for size, each in networks.items()})

    def forward(self, *by_position: Any, **by_name: Any) -> Any:
        """Run the network of the batch's size."""
        size = count(by_name if by_name else by_position)
        return self.networks[str(size)](*by_position, **by_name)


def exported(
    model: nn.Module, batches: Sequence[Any], only: Sequence[str] | None = None
) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    """Export a network to be timed, and load it into runtimes.

    Args:
        model: The network in eval mode on the CPU; it is left as it was.
        batches: One of each size that it will be given.
        only: The runtimes; None for all that are installed.

    Returns:
        The networks by the runtimes' names, and why some do not take the file.

    Raises:
        ModelError: It cannot be exported.
    """
    largest = max(batches, key=count)
    with in_memory_format(model, "contiguous"):
        if count(largest) > 1:  # torch takes a batch of one for a constant
            try:
                found, problems = load_to_be_timed(model, largest, None, only)
            except ModelError:  # a forward may be bound to the batch size
                found = {}
            if found:
                return found, problems
        loaded = {
            count(batch): load_to_be_timed(model, batch, count(batch), only) for batch in batches
        }
    refusals = dict.fromkeys(problem for _, refused in loaded.values() for problem in refused)
    networks: dict[str, nn.Module] = {}
    for name in next(iter(loaded.values()))[0]:
        of_sizes = {size: each[name] for size, (each, _) in loaded.items() if name in each}
        if len(of_sizes) == len(batches):
            networks[name] = _ByBatch(of_sizes) if len(batches) > 1 else of_sizes.popitem()[1]
    return networks, tuple(refusals)


def engine_named(name: str, device: str = "cpu") -> Engine:
    """Return a runtime by its name.

    Args:
        name: One of `compress.config.RUNTIMES`.
        device: That networks are on.

    Raises:
        ConfigError: It does not run on the device, or lacks a compiler.
        ModelError: A package is not installed.
    """
    if name == TORCH:
        return Engine()
    if name == COMPILE:
        if device == "cpu":
            require_compiler("--runtime compile")
        return _Compiling(COMPILE, torch.__version__)
    if device != "cpu":
        raise ConfigError(
            f"--runtime {name} is timed on the CPU alone, and --device is {device}; leave one of "
            "them out."
        )
    # Whoever does not have the exporter's packages should hear so now.
    require(name, _EXTRAS[name], f"Times on {name}")
    require_exporter()
    return _Exporting(name, importlib.metadata.version(name))


def require_exporter() -> None:
    """Import what writes and checks ONNX files.

    Raises:
        ModelError: A package is not installed.
    """
    for package in _NEEDED:
        require(package, EXTRA, NEEDED_BY)


def can_export() -> bool:
    """Whether all packages that write and check ONNX files are installed."""
    return all(map(installed, _NEEDED))
