"""The plan of least loss whose measured network is fast enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compress.choose.by_time.candidates import TimedBudgets
from compress.errors import BudgetError
from compress.plan import Choice

# Networks built and timed, at most; and those that are left when the fastest of all is tried, for
# lack of one that was fast enough, to find a less drastic one.
TRIALS = 7
AFTER_THE_LEAST = 4
# Parts of the budget. A time is not the same twice: what is aimed at; what a network may take to be
# accepted, twice in a row; and how near it must be to be worth no other trial.
AIM = 0.95
SAFE = 0.98
CLOSE = 0.92


@dataclass(frozen=True)
class FoundTime:
    """What a search came to.

    Attributes:
        choices: The plan's choices.
        ratio: Measured time over that of the dense network, the longer of two measurements.
        memory_format: What it was timed in.
        trials: How many networks were timed.
    """

    choices: list[Choice]
    ratio: float
    memory_format: str
    trials: int


def slowest_within(
    budgets: Sequence[TimedBudgets],
    measure: Callable[[list[Choice], str], float],
    fraction: float,
    trials: int = TRIALS,
) -> FoundTime:
    """Search the predicted budget for the largest whose measured network keeps the real one.

    The layers' times alone miss what the layers do to each other, so each trial's measured ratio
    moves the next budget, by interpolation between the trials around it. What seems fast enough is
    measured again, lest the luckiest measurement be chosen.

    Args:
        budgets: One for each memory format.
        measure: Builds and times the network of a plan in a memory format: its time over the
            dense network's at its best.
        fraction: What the ratio may be at most.
        trials: How many networks may be tried; ``measure`` is called twice at most for each.

    Raises:
        BudgetError: Even the fastest candidates take longer; the message names the ratio reached.
    """
    chosen, scale = _chosen(budgets, fraction)
    smallest = chosen.smallest()
    below: tuple[float, float] | None = None
    above = (1.0, max(scale, 1.0))
    point = _first(chosen, scale, fraction)
    best: FoundTime | None = None  # safely within the budget
    barely: FoundTime | None = None
    for trial in range(1, trials + 1):
        choices = chosen.spend(point)
        ratio = measure(choices, chosen.memory_format)
        if ratio <= SAFE * fraction:
            ratio = max(ratio, measure(choices, chosen.memory_format))
        found = FoundTime(choices, ratio, chosen.memory_format, trial)
        if ratio <= SAFE * fraction:
            best, below = found, (point, ratio)
            if ratio >= CLOSE * fraction or point >= 1.0:
                return best
        else:
            above = (point, ratio)
            if ratio <= fraction:
                barely = found
            if point <= smallest:
                break
        point = _next(below, above, AIM * fraction, smallest)
        if best is None and trials - trial <= AFTER_THE_LEAST:
            point = smallest  # what is fast enough, if anything is; what is left looks above it
    reached = best or barely
    if reached is None:
        raise _unreachable(fraction, ratio)
    return reached


def first_choice(budgets: Sequence[TimedBudgets], fraction: float) -> list[Choice]:
    """What `slowest_within` tries first: the choices that are fast enough, as predicted."""
    chosen, scale = _chosen(budgets, fraction)
    return chosen.spend(_first(chosen, scale, fraction))


def _chosen(budgets: Sequence[TimedBudgets], fraction: float) -> tuple[TimedBudgets, float]:
    """The memory format that promises most, and the dense network's time in it over its best."""
    best_total = min(b.total for b in budgets)
    chosen = min(budgets, key=lambda b: _promise(b, fraction * best_total / b.total))
    return chosen, chosen.total / best_total


def _first(chosen: TimedBudgets, scale: float, fraction: float) -> float:
    return min(max(AIM * fraction / scale, chosen.smallest()), 1.0)


def _next(
    below: tuple[float, float] | None, above: tuple[float, float], aim: float, smallest: float
) -> float:
    """Interpolate between the trials around the aim; without one below, extrapolate from above."""
    high, high_ratio = above
    low, low_ratio = below or (0.0, 0.0)
    rise = high_ratio - low_ratio
    share = (aim - low_ratio) / rise if rise > 0 else 0.5
    point = low + min(max(share, 0.05), 0.95) * (high - low)
    return max(point, smallest)


def _promise(budgets: TimedBudgets, fraction: float) -> tuple[float, float]:
    """Predicted loss within a fraction, else infinity; then the smallest time."""
    least = budgets.smallest()
    if least > fraction:
        return math.inf, least * budgets.total
    return budgets.loss(budgets.spend(min(fraction, 1.0))), least * budgets.total


def _unreachable(fraction: float, ratio: float) -> BudgetError:
    return BudgetError(
        f"--latency {fraction:g} cannot be reached: with every layer at its fastest the network "
        f"still takes {math.ceil(ratio * 1e3) / 1e3:g} of the time of the dense network with its "
        "norms folded, as measured on this device. Raise the budget to that, allow more schemes "
        "(--schemes), or free layers that --keep or --rank fixes; narrow layers may have nothing "
        "to gain."
    )
