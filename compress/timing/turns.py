"""Timing by turns: the one clock of the package."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ROUNDS = 7

Run = Callable[[], object]
Clock = Callable[[], float]


def measure(
    callables: Sequence[Run],
    *,
    rounds: int = ROUNDS,
    min_seconds: float = 0.1,
    synchronise: Callable[[], object] | None = None,
    clock: Clock = time.perf_counter,
) -> list[float]:
    """Time callables in turns and return the median seconds of one call of each.

    Each is called twice to warm up. Then every round gives each one turn, which calls it as often
    as it takes for all rounds together to last ``min_seconds``, and starts one further in the list
    than the round before.

    Args:
        callables: What to time, without arguments.
        rounds: Turns of each; more are added, up to four times as many, where the first calls were
            so slow that the turns came out too short.
        min_seconds: How long each is timed in all, at least.
        synchronise: Called before the clock is read, as ``torch.cuda.synchronize``, for devices
            that return before their work is done.
        clock: Seconds since some moment.

    Raises:
        ValueError: ``rounds`` is not positive.
    """
    samples = sample([Case(run) for run in callables], rounds, min_seconds, synchronise, clock)
    return [statistics.median(turns) for turns in samples]


@dataclass(frozen=True)
class Pace:
    """How thoroughly something is timed.

    Attributes:
        rounds: Turns of each, at least.
        min_seconds: How long each is timed in all, at least.
        clock: Seconds since some moment.
    """

    rounds: int = ROUNDS
    min_seconds: float = 0.5
    clock: Clock = time.perf_counter


@dataclass(frozen=True)
class Case:
    """What is timed, and what has to be done before each turn outside the time."""

    run: Run
    prepare: Run = lambda: None


def sample(
    cases: Sequence[Case],
    rounds: int,
    min_seconds: float,
    synchronise: Callable[[], object] | None,
    clock: Clock,
) -> list[list[float]]:
    """Return the seconds per call of each case in each round; see `measure`."""
    if rounds < 1:
        raise ValueError(f"rounds = {rounds} is not a positive number")
    if not cases:
        return []

    def turn(case: Case, calls: int) -> float:
        case.prepare()
        if synchronise:
            synchronise()
        start = clock()
        for _ in range(calls):
            case.run()
        if synchronise:
            synchronise()
        return clock() - start

    calls = []
    for case in cases:
        turn(case, 1)  # allocations, kernel choice, first touch of the weights
        calls.append(_calls_per_turn(turn(case, 1), min_seconds / rounds))
    samples: list[list[float]] = [[] for _ in cases]
    totals = [0.0] * len(cases)
    done = 0
    while done < rounds or (min(totals) < min_seconds and done < 4 * rounds):
        for offset in range(len(cases)):
            index = (done + offset) % len(cases)
            seconds = turn(cases[index], calls[index])
            totals[index] += seconds
            samples[index].append(seconds / calls[index])
        done += 1
    return samples


def _calls_per_turn(seconds: float, wanted: float) -> int:
    if seconds >= wanted:
        return 1
    return min(math.ceil(wanted / max(seconds, 1e-9)), 10_000)
