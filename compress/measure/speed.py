"""What a result costs beside the dense network: counted, and measured in real time."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.config import TORCH, RunConfig
from compress.deploy.engines import Engine, engine_named
from compress.measure.cost import model_cost
from compress.measure.runtimes import on_runtimes
from compress.network.baseline import Network
from compress.result import CostSummary, Latency
from compress.running.modules import cast
from compress.running.structure import expanded, like_weights
from compress.timing.networks import Timing, time_network_formats
from compress.timing.turns import Pace

# channels_last is recorded where it wins by this much, on networks that take so long at least:
# below, timer noise would decide, and equal runs must come out as equal bytes.
CLEAR_WIN = 0.95
LEAST_SECONDS = 1e-3
# Timing takes at most this share of the time that was spent before it, and may take so many seconds
# in any case.
SHARE = 0.1
LEAST_LIMIT = 5.0

Timings = dict[tuple[str, str], Timing]


@dataclass(frozen=True)
class Stopwatch:
    """What is timed of a result, and how long that may take.

    Attributes:
        batch: What to time beside batches of one.
        memory_formats: What the result may be saved in; by default what its forward takes.
        most_seconds: How long all of it together may take; None where nothing is to be timed.
        engine: The runtime.
    """

    batch: int
    memory_formats: Sequence[str] = ()
    most_seconds: float | None = math.inf
    engine: Engine = Engine()

    @classmethod
    def of(cls, config: RunConfig, seconds: float, memory_formats: Sequence[str] = ()) -> Stopwatch:
        """What a configuration asks for, after so many seconds of other work."""
        most = None if config.no_latency else most_seconds(seconds)
        engine = Engine() if most is None else engine_named(config.runtime, config.device)
        return cls(config.latency_batch, memory_formats, most, engine)


def most_seconds(seconds: float) -> float:
    """How long timing may take after so many seconds of other work."""
    return max(LEAST_LIMIT, SHARE * seconds)


def costs(
    network: Network, final: nn.Module, dtype: torch.dtype, stopwatch: Stopwatch
) -> CostSummary:
    """Count and time the original, the baseline and the result.

    Both networks are timed in every memory format, in turns: the dense one is taken at its best,
    the result in the format that suits it at the larger batch.

    Args:
        network: The dense baseline.
        final: The result.
        dtype: What it is saved in; the baseline is timed in that too.
        stopwatch: What to time.
    """
    example = network.example
    size = torch.empty((), dtype=dtype).element_size()
    images = like_weights(example, next(final.parameters()))
    models = {"dense": cast(copy.deepcopy(network.model), dtype), "compressed": final}
    timings = _timings(models, images, network.memory_formats, stopwatch)
    formats = stopwatch.memory_formats or network.memory_formats
    chosen = "contiguous" if "contiguous" in formats else formats[0]
    if timings:
        chosen = best_format(timings[max(timings)], "compressed", formats)
    left_out = {stopwatch.batch} - timings.keys() if timings else set()
    rows: tuple[Latency, ...] = tuple(_latency(n, t, chosen) for n, t in timings.items())
    refused: tuple[str, ...] = ()
    engine, most = stopwatch.engine, stopwatch.most_seconds
    if engine.name != TORCH and most is not None:
        # Torch's times are taken anew, in turns with the others.
        rows, refused = on_runtimes(models, images, engine, sorted(timings), most)
    return CostSummary(
        original=model_cost(network.original, example, size),
        folded=model_cost(network.model, example, size),
        compressed=model_cost(final, images, size),
        latency=tuple(row for row in rows if row.runtime == engine.name),
        memory_format=chosen,
        device=str(network.device),
        threads=torch.get_num_threads(),
        too_slow=tuple(left_out),
        beside=tuple(row for row in rows if row.runtime != engine.name),
        refused=refused,
    )


def _timings(
    models: Mapping[str, nn.Module], images: Any, formats: Sequence[str], stopwatch: Stopwatch
) -> dict[int, Timings]:
    """Timings by batch; a batch of which one round would take too long is left out."""
    if stopwatch.most_seconds is None:
        return {}
    timings: dict[int, Timings] = {}
    batches = sorted({1, stopwatch.batch})
    left = stopwatch.most_seconds
    for index, batch in enumerate(batches):
        if timings:
            a_round = batch * sum(timing.seconds for timing in timings[1].values())
            if a_round > left:
                break
        begun = time.perf_counter()
        pace = Pace(most_seconds=left / (len(batches) - index))
        timings[batch] = time_network_formats(models, expanded(images, batch), formats, pace=pace)
        left -= time.perf_counter() - begun
    return timings


def best_format(timings: Timings, name: str, formats: Sequence[str]) -> str:
    """The memory format that a network is fastest in; contiguous where that is not clear."""
    if "contiguous" not in formats:
        return formats[0]
    plain = timings[name, "contiguous"].seconds
    best = min(formats, key=lambda form: timings[name, form].seconds)
    clear = timings[name, best].seconds < CLEAR_WIN * plain and plain >= LEAST_SECONDS
    return best if clear else "contiguous"


def dense_seconds(timings: Timings) -> tuple[float, str]:
    """Seconds of the dense network in its best memory format, and that format."""
    return min((t.seconds, form) for (name, form), t in timings.items() if name == "dense")


def _latency(count: int, timings: Timings, memory_format: str) -> Latency:
    dense, form = dense_seconds(timings)
    found = timings["compressed", memory_format]
    return Latency(count, dense, found.seconds, found.seconds / dense, found.rounds, form)
