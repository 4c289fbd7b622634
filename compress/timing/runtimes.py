"""Networks on several runtimes, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.running.memory_format import MEMORY_FORMATS
from compress.running.structure import expanded
from compress.timing.networks import time_network_formats
from compress.timing.turns import Pace

TORCH = "torch"
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
    found = []
    for batch in batches:
        pace = Pace(most_seconds=most_seconds / len(batches))
        timings = time_network_formats(plain, expanded(example, batch), pace=pace)

        def seconds(runtime: str, which: str, timings: Any = timings) -> float:
            forms = MEMORY_FORMATS if runtime == TORCH else ("contiguous",)
            return min(float(timings[f"{runtime} {which}", form].seconds) for form in forms)

        for name in networks:
            original = seconds(name, _ORIGINAL) if name in originals else None
            found.append(RuntimeSeconds(name, batch, seconds(name, _NETWORK), original))
    return tuple(found)
