"""Choosing by what accuracy may fall: networks compressed and judged on the validation images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from compress.calibrate.statistics import Calibration
from compress.choose import Budgets
from compress.config import RunConfig
from compress.data import batches
from compress.errors import ConfigError, DataError
from compress.fit.layers import fit_plan
from compress.inputs.load import Inputs
from compress.measure.accuracy import all_logits, compare, require_labels
from compress.network.baseline import Network
from compress.plan import Choice, Plan
from compress.progress import Track

# Evaluations of a compressed network on the validation images, at most.
EVALUATIONS = 8


def searched_plan(
    network: Network,
    inputs: Inputs,
    calibration: Calibration,
    config: RunConfig,
    batch_size: int,
    track: Track,
) -> Plan:
    """The cheapest plan whose validation accuracy falls by at most ``target_drop`` points.

    Raises:
        DataError: There are no labelled validation images to measure it on.
    """
    images = inputs.split.validation
    if not len(images):
        raise DataError(
            "There are no validation images to measure the accuracy on, which --target-drop looks "
            "at: calibrate on two images at least (--data, --calibration-images)."
        )
    require_labels(images)
    target = config.rule_value or 0.0
    loaded = batches(images, batch_size, config.workers)
    before = all_logits(network.original, loaded, "search: original", track)

    def plan_of(choices: list[Choice]) -> Plan:
        return Plan("target_drop", target, config.metric, tuple(choices))

    def drop(choices: list[Choice]) -> float:
        replaced = fit_plan(
            network, plan_of(choices), calibration, config, inputs.split, batch_size, track
        )
        metric = compare(
            network.original, replaced.model, images, config,
            batch_size=batch_size, describe="search", before_logits=before, track=track,
        )  # fmt: skip
        return metric.drop or 0.0

    budgets = Budgets(network.model, network.sites, calibration, config, track)
    found = cheapest_within_drop(budgets, drop, target)
    why = f"cheapest found that loses at most {target:g} points on the validation images"
    choices = [
        dataclasses.replace(c, reason=why if c.rewritten else c.reason) for c in found.choices
    ]
    return plan_of(choices)


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
