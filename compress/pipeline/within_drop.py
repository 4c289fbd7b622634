"""The cheapest network whose validation accuracy falls by at most so many points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compress.choose import Budgets
from compress.errors import ConfigError
from compress.plan import Choice

# Evaluations of a compressed network on the validation images, at most.
EVALUATIONS = 8


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        fraction: The budget, of the dense network's MACs; 1 where nothing could be spared.
        choices: The plan's choices.
        drop: The fall in points on the validation images.
        evaluations: How many networks were evaluated.
    """

    fraction: float
    choices: list[Choice]
    drop: float
    evaluations: int


def cheapest_within_drop(
    budgets: Budgets,
    drop: Callable[[list[Choice]], float],
    target: float,
    evaluations: int = EVALUATIONS,
) -> Found:
    """Bisect the MACs budget for the smallest whose accuracy falls by at most ``target`` points.

    Accuracy is taken to fall with the budget; a point estimate on the validation images decides.

    Args:
        budgets: Plans for every budget.
        drop: Builds and evaluates the network of a plan: its fall in points.
        target: Points that may be lost.
        evaluations: How often ``drop`` may be called.

    Raises:
        ConfigError: ``evaluations`` is not positive.
    """
    if evaluations < 1:
        raise ConfigError("a search needs at least one evaluation")
    best = Found(1.0, budgets.spend(1.0), 0.0, 0)
    low, high = budgets.smallest(), 1.0
    for done in range(1, evaluations + 1):
        middle = (low + high) / 2
        choices = budgets.spend(middle)
        lost = drop(choices)
        if lost <= target:
            best, high = Found(middle, choices, lost, done), middle
        else:
            low = middle
    return best
