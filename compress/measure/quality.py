"""How good a network is, as one number, and which of several networks no other one beats."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compress.result import EndMetric


def quality(metric: EndMetric | None) -> float:
    """Return an accuracy, another measure's value, an agreement or an error: the more the better.

    Minus infinity where nothing was measured.
    """
    if metric is None:
        return -math.inf
    if metric.custom is not None:
        return -metric.custom.after if metric.custom.lower_is_better else metric.custom.after
    found = metric.agreement if metric.top1_after is None else metric.top1_after
    if found is not None:
        return found
    return -max((output.relative_mse or 0.0 for output in metric.outputs), default=math.inf)


def unbeaten(rated: Sequence[tuple[float, float]]) -> list[bool]:
    """Say of each pair of a cost and a quality whether it is on the Pareto front.

    It is where no other one costs as little and is as good, and differs from it.
    """
    return [
        not any(c <= cost and g >= good and (c, g) != (cost, good) for c, g in rated)
        for cost, good in rated
    ]
