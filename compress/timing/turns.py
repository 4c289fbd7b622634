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
    pace = Pace(rounds, min_seconds, clock)
    samples = sample([Case(run) for run in callables], pace, synchronise)
    return [statistics.median(turns) for turns in samples]


@dataclass(frozen=True)
class Pace:
    """How thoroughly something is timed.

    Attributes:
        rounds: Turns of each, at least.
        min_seconds: How long each is timed in all, at least.
        clock: Seconds since some moment.
        most_seconds: How long all of it together may take. Where turns are too slow for that there
            are fewer rounds, down to a single one; only that each is called once is not spared.
    """

    rounds: int = ROUNDS
    min_seconds: float = 0.5
    clock: Clock = time.perf_counter
    most_seconds: float = math.inf


@dataclass(frozen=True)
class Case:
    """What is timed, and what has to be done before each turn outside the time."""

    run: Run
    prepare: Run = lambda: None


def sample(
    cases: Sequence[Case], pace: Pace, synchronise: Callable[[], object] | None
) -> list[list[float]]:
    """Return the seconds per call of each case in each round; see `measure`."""
    if pace.rounds < 1:
        raise ValueError(f"rounds = {pace.rounds} is not a positive number")
    if not cases:
        return []
    stopwatch = _Stopwatch(pace, synchronise)
    # Where one call is long, what only the first call does is little beside it.
    patience = pace.most_seconds / (4 * len(cases))
    warm = [stopwatch.warmed(case, patience) for case in cases]
    calls = [_calls_per_turn(seconds, pace.min_seconds / pace.rounds) for seconds in warm]
    a_round = sum(seconds * number for seconds, number in zip(warm, calls, strict=True))
    if not stopwatch.has_time_for(a_round):
        return [[seconds] for seconds in warm]
    samples: list[list[float]] = [[] for _ in cases]
    totals = [0.0] * len(cases)
    done = 0
    while done < pace.rounds or (min(totals) < pace.min_seconds and done < 4 * pace.rounds):
        for offset in range(len(cases)):
            index = (done + offset) % len(cases)
            seconds = stopwatch.turn(cases[index], calls[index])
            totals[index] += seconds
            samples[index].append(seconds / calls[index])
        done += 1
        if not stopwatch.has_time_for(a_round):
            break
    return samples


class _Stopwatch:
    """Takes the time of turns, and sees to it that they end in time."""

    def __init__(self, pace: Pace, synchronise: Callable[[], object] | None) -> None:
        self.clock, self.synchronise = pace.clock, synchronise or (lambda: None)
        self.end = pace.clock() + pace.most_seconds

    def turn(self, case: Case, calls: int) -> float:
        """Seconds that so many calls take."""
        case.prepare()
        self.synchronise()
        start = self.clock()
        for _ in range(calls):
            case.run()
        self.synchronise()
        return self.clock() - start

    def warmed(self, case: Case, patience: float) -> float:
        """Seconds of a call after the first, which allocates, chooses kernels, loads weights.

        Of the first itself, where that takes longer than ``patience``.
        """
        first = self.turn(case, 1)
        return first if first > patience else self.turn(case, 1)

    def has_time_for(self, seconds: float) -> bool:
        """Whether so much more would end in time."""
        return self.clock() + seconds <= self.end


def _calls_per_turn(seconds: float, wanted: float) -> int:
    if seconds >= wanted:
        return 1
    return min(math.ceil(wanted / max(seconds, 1e-9)), 10_000)
