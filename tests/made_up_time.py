"""A device whose times are made up: linear in the widths of a layer, and the same every time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from stopwatch import stop_the_clock
from torch import Tensor, nn

from compress.choose.by_time.sketch import narrowed
from compress.layers import kind_of
from compress.network.baseline import Network
from compress.running.forward import forward_hooks
from compress.timing.layers import LatencyTable, LayerTimer, Setting
from compress.timing.networks import Timing

# A device that takes so long to begin with a layer, for a product, and for a number given.
BEGIN, PRODUCT, NUMBER = 3e-5, 1e-8, 2e-7


def seconds_of(layer: nn.Module, output: Tensor) -> float:
    """What a layer takes that gives this."""
    kind = kind_of(layer)
    assert kind is not None
    channels = output.shape[-1] if isinstance(layer, nn.Linear) else output.shape[1]
    return BEGIN + PRODUCT * kind.weight(layer).numel() * (output.numel() // channels)


def layer_seconds(module: nn.Module, shape: tuple[int, ...]) -> float:
    """What a layer, or a chain of them, takes by itself."""
    return _seconds(module, torch.zeros(shape), each=0.0)


def network_seconds(model: nn.Module, images: Tensor) -> float:
    """What a network takes: its layers, and as much for every number that one of them gives."""
    return _seconds(model, images, each=NUMBER)


def _seconds(model: nn.Module, images: Tensor, *, each: float) -> float:
    seconds = 0.0

    def add(layer: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal seconds
        seconds += seconds_of(layer, output) + each * output.numel()

    layers = [m for m in model.modules() if kind_of(m) is not None]
    with torch.no_grad(), forward_hooks(dict.fromkeys(layers, add)):
        model(images)
    return seconds


class MadeUpTable(LatencyTable):
    """Times of single layers on that device."""

    def time(self, layers: Any, *_: Any) -> list[float]:
        return [layer_seconds(module, tuple(shape)) for module, shape in layers]


@dataclass(frozen=True)
class MadeUpTimer:
    """Times of whole networks on that device."""

    network: Network
    batch: int = 2

    @property
    def dense(self) -> nn.Module:
        return self.network.model

    @cached_property
    def images(self) -> Tensor:
        found = self.network.example.expand(self.batch, -1, -1, -1)
        assert isinstance(found, Tensor)
        return found

    @cached_property
    def total(self) -> float:
        return network_seconds(self.dense, self.images)

    @property
    def totals(self) -> dict[str, float]:
        return {"contiguous": self.total}

    dense_format = "contiguous"

    def of_layers(self, table: LatencyTable, memory_format: str) -> LayerTimer:
        setting = Setting.here(memory_format=memory_format)
        return LayerTimer(table, setting, self.batch)

    def ratio_at(self, wide: Mapping[str, int], _: str) -> float:
        small = narrowed(self.dense, self.network, wide)
        return network_seconds(small, self.images) / self.total


def use_made_up_times(patch: pytest.MonkeyPatch) -> None:
    """Let whole runs take place on that device."""
    stop_the_clock(patch)

    def taken(models: Any, given: Tensor, formats: Any, *_: Any, **__: Any) -> Any:
        return {
            (name, form): Timing(network_seconds(model, given), 1, len(given), form, 1)
            for name, model in models.items()
            for form in formats
        }

    patch.setattr("compress.choose.by_time.plan.time_network_formats", taken)
    patch.setattr("compress.measure.speed.time_network_formats", taken)
    patch.setattr("compress.choose.by_time.plan.LatencyTable", MadeUpTable)
