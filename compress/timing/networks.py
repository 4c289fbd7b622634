"""Whole networks, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.running.memory_format import MEMORY_FORMATS, Layout, evaluating, in_format
from compress.timing.turns import Case, Pace, sample


@dataclass(frozen=True)
class Timing:
    """What one network took.

    Attributes:
        seconds: Median time of a batch.
        rounds: Number of turns that the median is over.
        batch: Images in the batch.
        memory_format: ``"contiguous"`` or ``"channels_last"``, of weights and input.
        threads: Threads that torch computed with.
    """

    seconds: float
    rounds: int
    batch: int
    memory_format: str
    threads: int


def time_network(
    models: Mapping[str, nn.Module],
    example: Tensor,
    memory_format: str = "contiguous",
    pace: Pace = Pace(),
) -> dict[str, float]:
    """Time whole networks in turns on one batch; see `time_network_formats`.

    Returns:
        The median seconds of one batch by the name of the model.
    """
    timings = time_network_formats(models, example, (memory_format,), pace)
    return {name: timing.seconds for (name, _), timing in timings.items()}


def time_network_formats(
    models: Mapping[str, nn.Module],
    example: Tensor,
    memory_formats: Sequence[str] = tuple(MEMORY_FORMATS),
    pace: Pace = Pace(),
) -> dict[tuple[str, str], Timing]:
    """Time whole networks, each in every memory format, all in turns on one batch.

    The networks run in eval mode under inference mode with the threads that torch has now, and are
    left as they were. They hold their weights once more for each memory format meanwhile.

    Args:
        models: Networks by name, on the device of ``example`` and in its dtype.
        example: A batch ``[N, …]``.
        memory_formats: Of weights and, where it has four dimensions, of the batch.
        pace: How thoroughly.

    Returns:
        A `Timing` by model name and memory format.

    Raises:
        ValueError: An unknown memory format, or ``pace.rounds`` is not positive.
    """
    pairs = [(name, form) for form in memory_formats for name in models]
    layout = Layout(models.values(), memory_formats)
    inputs = {form: in_format(example, form) for form in memory_formats}

    def case(name: str, form: str) -> Case:
        return Case(lambda: models[name](inputs[form]), lambda: layout.use(form))

    try:
        with evaluating(models.values()):
            samples = sample([case(*pair) for pair in pairs], pace, synchroniser(example.device))
    finally:
        layout.restore()
    return {
        (name, form): Timing(
            seconds=statistics.median(turns),
            rounds=len(turns),
            batch=example.shape[0],
            memory_format=form,
            threads=torch.get_num_threads(),
        )
        for (name, form), turns in zip(pairs, samples, strict=True)
    }


def synchroniser(device: torch.device) -> Callable[[], object] | None:
    """Return what waits for the device's work; None where calls return with their work done."""
    if device.type == "cpu":
        return None
    return lambda: torch.accelerator.synchronize(device)
