"""What a result costs beside the dense network: counted, and measured in real time."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from compress.measure.cost import model_cost
from compress.network.baseline import Network
from compress.result import CostSummary, Latency
from compress.running.structure import expanded, like_weights
from compress.timing.networks import Timing, time_network_formats

# channels_last is recorded where it wins by this much, on networks that take so long at least:
# below, timer noise would decide, and equal runs must come out as equal bytes.
CLEAR_WIN = 0.95
LEAST_SECONDS = 1e-3

Timings = dict[tuple[str, str], Timing]


def costs(
    network: Network,
    final: nn.Module,
    dtype: torch.dtype,
    batch: int,
    memory_formats: Sequence[str] = (),
) -> CostSummary:
    """Count and time the original, the baseline and the result.

    Both networks are timed in every memory format, in turns: the dense one is taken at its best,
    the result in the format that suits it at the larger batch.

    Args:
        network: The dense baseline.
        final: The result.
        dtype: What it is saved in; the baseline is timed in that too.
        batch: What to time beside batches of one.
        memory_formats: What the result may be saved in; by default what its forward takes.
    """
    example = network.example
    size = torch.empty((), dtype=dtype).element_size()
    images = like_weights(example, next(final.parameters()))
    models = {"dense": copy.deepcopy(network.model).to(dtype), "compressed": final}
    formats = network.memory_formats
    batches = sorted({1, batch})
    timings = {n: time_network_formats(models, expanded(images, n), formats) for n in batches}
    chosen = best_format(timings[batch], "compressed", memory_formats or formats)
    return CostSummary(
        original=model_cost(network.original, example, size),
        folded=model_cost(network.model, example, size),
        compressed=model_cost(final, images, size),
        latency=tuple(_latency(n, found, chosen) for n, found in timings.items()),
        memory_format=chosen,
        device=str(network.device),
        threads=torch.get_num_threads(),
    )


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
