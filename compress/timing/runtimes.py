"""Networks on several runtimes, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.config import TORCH
from compress.running.formats import formats_of
from compress.running.structure import expanded
from compress.timing.networks import time_network_formats
from compress.timing.turns import Pace

_NETWORK, _ORIGINAL = "network", "original"


@dataclass(frozen=True)
class RuntimeSeconds:
    """Median seconds of a batch on one runtime; ``original`` are those of the original network."""

    runtime: str
    batch_size: int
    seconds: float
    original: float | None = None


def time_runtimes(
    networks: Mapping[str, nn.Module],
    originals: Mapping[str, nn.Module],
    example: Any,
    batches: Sequence[int],
    most_seconds: float,
) -> tuple[RuntimeSeconds, ...]:
    """Time a network and its original on all runtimes, in turns; torch in its best memory format.

    Args:
        networks: The network by runtime.
        originals: The same of the original; empty where there is none.
        example: The inputs of one image ``[1, ...]``.
        batches: Batch sizes.
        most_seconds: How long all of it may take.
    """
    models = {(name, _NETWORK): model for name, model in networks.items()}
    models |= {(name, _ORIGINAL): model for name, model in originals.items()}
    plain = {" ".join(key): model for key, model in models.items()}
    # Other runtimes choose the layout by themselves.
    formats = {
        " ".join(key): formats_of(model, example) if key[0] == TORCH else ("contiguous",)
        for key, model in models.items()
    }
    found = []
    for batch in batches:
        pace = Pace(most_seconds=most_seconds / len(batches))
        timings = time_network_formats(plain, expanded(example, batch), formats, pace)

        def seconds(runtime: str, which: str, timings: Any = timings) -> float:
            name = f"{runtime} {which}"
            return min(float(timings[name, form].seconds) for form in formats[name])

        for name in networks:
            original = seconds(name, _ORIGINAL) if name in originals else None
            found.append(RuntimeSeconds(name, batch, seconds(name, _NETWORK), original))
    return tuple(found)
