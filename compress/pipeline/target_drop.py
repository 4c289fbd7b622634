"""Choosing by what accuracy may fall: networks compressed and judged on the validation images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from compress.choose import Budgets, Chooser
from compress.data import ImageSet
from compress.errors import ConfigError, DataError
from compress.measure.accuracy import Yardstick, require_labels, require_ranked
from compress.measure.by_task import require_targets
from compress.pipeline.job import Job
from compress.pipeline.promised import PromisedBudgets
from compress.pipeline.trials import SEARCHED
from compress.plan import Choice, Plan
from compress.rules.macs import BY_MACS
from compress.tasks import TaskMeasure

# Evaluations of a compressed network on the validation images, at most.
EVALUATIONS = 8


def choose_within_drop(job: Job, chooser: Chooser, points: float) -> list[Choice]:
    """The cheapest choices whose validation accuracy falls by at most so many points.

    Raises:
        DataError: There are no labelled validation images to measure it on.
    """
    images, network = job.inputs.split.validation, job.network
    if not len(images):
        raise DataError(
            "There are no validation images to measure the accuracy on, which --target-drop looks "
            "at: calibrate on two images at least (--data, --calibration-images)."
        )
    yardstick = _yardstick(job, images)
    before = yardstick.known(network.original, images, "search: original")

    def drop(choices: list[Choice]) -> float:
        config = job.config
        plan = Plan(config.rule, points, config.metric, tuple(choices), slices=config.slices)
        replaced = job.fitter.carry_out(plan, chooser.calibration)
        metric = yardstick.compare(network.original, replaced.model, images, "search", before)
        return metric.drop or 0.0

    budgets = PromisedBudgets(job, chooser.calibration, chooser.budgets(BY_MACS))
    found = cheapest_within_drop(budgets, drop, points)
    why = f"cheapest found that loses at most {points:g} points on the validation images"
    return [dataclasses.replace(c, reason=why if c.rewritten else c.reason) for c in found.choices]


def _yardstick(job: Job, images: ImageSet) -> Yardstick:
    """What the search goes by: the task's measure, else accuracy.

    It is accuracy whatever measure of the user's own the result is judged by in the end.
    """
    metric = job.yardstick.metric
    if isinstance(metric, TaskMeasure):
        require_targets(metric.task, images)
        return job.yardstick
    require_labels(images)
    require_ranked(job.network.reading, SEARCHED)
    return Yardstick(job.loader, track=job.track, reading=job.network.reading)


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
    budgets: Budgets | PromisedBudgets,
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
