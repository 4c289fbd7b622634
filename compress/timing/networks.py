"""Whole networks, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.running.memory_format import MEMORY_FORMATS, Layout, evaluating
from compress.running.structure import arguments, count, main_tensor, placed
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
        fastest: The time that a tenth of the turns kept, which what else the machine does delays
            least; None where it is not known.
    """

    seconds: float
    rounds: int
    batch: int
    memory_format: str
    threads: int
    fastest: float | None = None

    @property
    def undisturbed(self) -> float:
        """`fastest`, as far as it is known, else the median."""
        return self.seconds if self.fastest is None else self.fastest


def time_network(
    models: Mapping[str, nn.Module],
    example: Any,
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
    example: Any,
    memory_formats: Sequence[str] | Mapping[str, Sequence[str]] = tuple(MEMORY_FORMATS),
    pace: Pace = Pace(),
) -> dict[tuple[str, str], Timing]:
    """Time whole networks, each in every memory format, all in turns on one batch.

    The networks run in eval mode under inference mode with the threads that torch has now, and are
    left as they were. They hold their weights once more for each memory format meanwhile.

    Args:
        models: Networks by name, on the device of ``example`` and in its dtype.
        example: A batch ``[N, …]``: a tensor, or a structure of several.
        memory_formats: Of weights and, where it has four dimensions, of the batch; the same for
            all, or by the name of the model.
        pace: How thoroughly.

    Returns:
        A `Timing` by model name and memory format.

    Raises:
        ValueError: An unknown memory format, or ``pace.rounds`` is not positive.
    """
    of = memory_formats
    taken = of if isinstance(of, Mapping) else dict.fromkeys(models, tuple(of))
    forms = list(dict.fromkeys(form for forms in taken.values() for form in forms))
    pairs = [(name, form) for form in forms for name in models if form in taken[name]]
    layout = Layout(models.values(), forms)
    device = main_tensor(example).device
    calls = {form: arguments(placed(example, device, form)) for form in forms}

    def case(name: str, form: str) -> Case:
        by_position, by_name = calls[form]
        return Case(lambda: models[name](*by_position, **by_name), lambda: layout.use(form))

    try:
        with evaluating(models.values()):
            samples = sample([case(*pair) for pair in pairs], pace, synchroniser(device))
    finally:
        layout.restore()
    return {
        (name, form): Timing(
            seconds=statistics.median(turns),
            rounds=len(turns),
            batch=count(example),
            memory_format=form,
            threads=torch.get_num_threads(),
            fastest=sorted(turns)[len(turns) // 10],
        )
        for (name, form), turns in zip(pairs, samples, strict=True)
    }


def synchroniser(device: torch.device) -> Callable[[], object] | None:
    """Return what waits for the device's work; None where calls return with their work done."""
    if device.type == "cpu":
        return None
    return lambda: torch.accelerator.synchronize(device)
