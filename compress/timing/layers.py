"""What layers took, remembered."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.files import BrokenSeal, sealed_record, unsealed_record
from compress.running.memory_format import Layout, evaluating, in_format
from compress.timing.networks import synchroniser
from compress.timing.turns import Case, Pace, Run, sample
from compress.untrusted import Unreadable, read_json, read_record

# From 2 on, the file carries a digest of its content; from 3 on, times are of a runtime.
TABLE_FORMAT = 3


# What puts a layer on a runtime, for inputs such as the one given.
Build = Callable[[nn.Module, Tensor], nn.Module]


def as_it_is(layer: nn.Module, _: Tensor) -> nn.Module:
    """Return the layer: torch runs it."""
    return layer


@dataclass(frozen=True)
class Setting:
    """Where and how something runs: what a measured time is valid for, beside the layer itself."""

    device: str
    device_name: str
    threads: int
    dtype: str
    memory_format: str
    runtime: str

    @classmethod
    def here(
        cls,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        memory_format: str = "contiguous",
        runtime: str = f"torch {torch.__version__}",
    ) -> Setting:
        """Return the setting of this process as it is now; the runtime with its version."""
        return cls(
            device=str(device),
            device_name=_device_name(torch.device(device)),
            threads=torch.get_num_threads(),
            dtype=str(dtype).removeprefix("torch."),
            memory_format=memory_format,
            runtime=runtime,
        )


@dataclass(frozen=True)
class LatencyKey:
    """What a layer's time depends on. ``input_shape`` starts with the batch."""

    device_name: str
    threads: int
    dtype: str
    memory_format: str
    runtime: str
    input_shape: tuple[int, ...]
    layer: str


def describe_layer(module: nn.Module) -> str:
    """Return what a layer's time depends on, its values left out: its printed form on one line."""
    return " ".join(repr(module).split())


class LatencyTable:
    """Measured seconds of layers by `LatencyKey`, JSON both ways."""

    def __init__(self, seconds: Mapping[LatencyKey, float] | None = None) -> None:
        self._seconds = dict(seconds or {})

    def __len__(self) -> int:
        return len(self._seconds)

    def __contains__(self, key: LatencyKey) -> bool:
        return key in self._seconds

    def __getitem__(self, key: LatencyKey) -> float:
        return self._seconds[key]

    @staticmethod
    def key(module: nn.Module, input_shape: Sequence[int], setting: Setting) -> LatencyKey:
        """Return the key of a layer at an input shape, the batch included."""
        return LatencyKey(
            device_name=setting.device_name,
            threads=setting.threads,
            dtype=setting.dtype,
            memory_format=setting.memory_format,
            runtime=setting.runtime,
            input_shape=tuple(input_shape),
            layer=describe_layer(module),
        )

    def time(
        self,
        layers: Sequence[tuple[nn.Module, Sequence[int]]],
        setting: Setting,
        pace: Pace = Pace(min_seconds=0.05),
        build: Build = as_it_is,
    ) -> list[float]:
        """Return the seconds of each layer at its input shape, measuring what is not known yet.

        What has to be measured takes turns in one run, so pass all that is to be compared at once.
        The fastest turn of each counts: what else the machine does only adds to a time.

        Args:
            layers: Modules, on the setting's device and in its dtype, with their input shapes
                ``[N, …]``; left as they were.
            setting: Where and how they run.
            pace: How thoroughly.
            build: Puts a layer on the setting's runtime.

        Raises:
            ValueError: The setting's threads are not those that torch has now, or its memory
                format is unknown.
        """
        if setting.threads != torch.get_num_threads():
            raise ValueError(
                f"the setting is for {setting.threads} threads and torch has "
                f"{torch.get_num_threads()} now"
            )
        keys = [self.key(module, shape, setting) for module, shape in layers]
        unknown = {
            key: module
            for key, (module, _) in zip(keys, layers, strict=True)
            if key not in self._seconds
        }
        inputs = {key.input_shape: _random_input(key.input_shape, setting) for key in unknown}
        built = {key: build(module, inputs[key.input_shape]) for key, module in unknown.items()}

        def run(key: LatencyKey, module: nn.Module) -> Run:
            return lambda: module(inputs[key.input_shape])

        layout = Layout(built.values(), [setting.memory_format])
        layout.use(setting.memory_format)
        try:
            with evaluating(built.values()):
                cases = [Case(run(key, module)) for key, module in built.items()]
                turns = sample(cases, pace, synchroniser(torch.device(setting.device)))
        finally:
            layout.restore()
        self._seconds.update(zip(built, map(min, turns), strict=True))
        return [self._seconds[key] for key in keys]

    def to_json(self) -> str:
        """Write every entry and a digest of them; the inverse of `read`."""
        entries = [{**asdict(key), "seconds": s} for key, s in self._seconds.items()]
        record = sealed_record({"format": TABLE_FORMAT, "entries": entries})
        return json.dumps(record, indent=1) + "\n"

    @classmethod
    def read(cls, path: str | Path) -> LatencyTable:
        """Read a table that was written by `to_json`.

        Raises:
            InputError: The file cannot be read, is damaged, was edited or is of another format.
        """
        advice = "delete it to measure afresh"
        try:
            raw = read_json(path)
        except OSError as error:
            raise InputError(f"The latency table {path} cannot be read: {error}.") from error
        except Unreadable as error:
            raise InputError(
                f"The latency table {path} is not JSON ({error}); {advice}."
            ) from error
        if not isinstance(raw, dict) or raw.get("format") != TABLE_FORMAT:
            raise InputError(
                f"{path} is not a latency table of a format that this version reads; {advice}."
            )
        try:
            return cls(dict(map(_entry, unsealed_record(raw)["entries"])))
        except BrokenSeal as error:
            raise InputError(f"The latency table {path} {error}; {advice}.") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"The latency table {path} is damaged ({error}); {advice}.") from error


@dataclass(frozen=True)
class LayerTimer:
    """How layers are timed.

    Attributes:
        table: What is known already; filled.
        setting: Where and how layers run.
        batch: Images a batch.
        build: Puts a layer, for inputs such as given, on the setting's runtime.
    """

    table: LatencyTable
    setting: Setting
    batch: int
    build: Build = as_it_is

    def time(self, layers: Sequence[tuple[nn.Module, Sequence[int]]], pace: Pace) -> list[float]:
        """Return the seconds of each layer at its input shape; see `LatencyTable.time`."""
        return self.table.time(layers, self.setting, pace, self.build)


def _entry(raw: dict[str, Any]) -> tuple[LatencyKey, float]:
    seconds = raw["seconds"]
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        raise ValueError(f"{seconds!r} seconds")
    values = {name: value for name, value in raw.items() if name != "seconds"}
    return read_record(LatencyKey, values, "an entry"), float(seconds)


def _random_input(shape: tuple[int, ...], setting: Setting) -> Tensor:
    """Make an input without touching the global random state."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    values = values.to(setting.device, getattr(torch, setting.dtype))
    return in_format(values, setting.memory_format)


def _device_name(device: torch.device) -> str:
    """Name the hardware, so that a table from another machine does not match by accident."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
