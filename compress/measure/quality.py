"""One number for how good a network is, by which networks of one job can be ordered."""

from __future__ import annotations

import math

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
