"""Whole networks take seconds to time; tests that are not about that say how long they took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from compress.running.memory_format import MEMORY_FORMATS
from compress.timing.networks import Timing


def stop_the_clock(patch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Let every network take a millisecond a batch, or the seconds given for its name.

    ``compressed_channels_last`` is the time of ``compressed`` in that memory format.
    """

    def taken(name: str, form: str) -> float:
        return seconds.get(f"{name}_{form}", seconds.get(name, 1e-3))

    def plain(models: Mapping[str, Any], *_: Any, **__: Any) -> dict[str, float]:
        return {name: taken(name, "contiguous") for name in models}

    def by_format(
        models: Mapping[str, Any], images: Any, formats: Any = (), *_: Any, **__: Any
    ) -> dict[tuple[str, str], Timing]:
        return {
            (name, form): Timing(taken(name, form), 1, len(images), form, 1)
            for name in models
            for form in (formats[name] if isinstance(formats, Mapping) else formats)
            or MEMORY_FORMATS
        }

    patch.setattr("compress.measure.speed.time_network_formats", by_format)
    patch.setattr("compress.timing.runtimes.time_network_formats", by_format)
    patch.setattr("compress.pipeline.evaluate.time_network", plain)
    patch.setattr("compress.sweep.deployed.time_network", plain)
