"""Budgets that hold what they promise: predicted losses checked on images nobody has seen.

A layer's loss is predicted from the images that it is fitted to, and where these are few compared
with its numbers, it promises too much: a budget would choose it first. So what a budget chooses is
fitted, its layers are measured on the validation images (`compress.calibrate.held_out`), and those
that lose clearly more than was predicted are dearer from then on; the budget chooses again, until
what it chooses keeps its promise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from compress.calibrate.held_out import HeldOutLoss, held_out_losses, ratios
from compress.calibrate.statistics import Calibration, Source
from compress.choose import Budgets
from compress.network.narrowing import Cut
from compress.pipeline.job import Job
from compress.plan import Choice, Plan

# How often a budget chooses anew.
ROUNDS = 3
# Too few images tell nothing.
LEAST_IMAGES = 8


@dataclass
class PromisedBudgets:
    """Budgets over candidates whose losses are corrected by what is measured.

    Attributes:
        job: The network and its images.
        calibration: The layers' statistics.
        budgets: As corrected so far.
    """

    job: Job
    calibration: Calibration
    budgets: Budgets

    def spend(self, fraction: float) -> list[Choice]:
        """One choice per layer; see `Budgets.spend`.

        Raises:
            BudgetError: The fraction cannot be reached.
        """
        choices = self.budgets.spend(fraction)
        check = check_of(self.job, self.calibration)
        for _ in range(ROUNDS):
            found = check(choices)
            if not found:
                break
            self.budgets = self.budgets.dearer(found)
            again = self.budgets.spend(fraction)
            if _same(again, choices):
                break
            choices = again
        return choices

    def smallest(self) -> float:
        """The smallest fraction that can be reached."""
        return self.budgets.smallest()


def check_of(job: Job, calibration: Calibration) -> Callable[[list[Choice]], dict[str, float]]:
    """Return what says how much more than predicted layers lose, where they do.

    With few validation images it says nothing.
    """
    if len(job.inputs.split.validation) < LEAST_IMAGES:
        return lambda _: {}
    return lambda choices: _broken(job, calibration, choices)


def _broken(job: Job, calibration: Calibration, choices: list[Choice]) -> dict[str, float]:
    names = [c.name for c in choices if c.rewritten]
    if not names:
        return {}
    config = job.config
    plan = Plan(config.rule, None, config.metric, tuple(choices), slices=config.slices)
    fitter = dataclasses.replace(job.fitter, refit=False)
    fitted = fitter.fit(plan, calibration)
    replaced = fitter.replace(fitted)
    predicted = {name: fitted.predicted[name].loss for name in names if name in fitted.predicted}
    return ratios(predicted, _measured(job, replaced.model, fitted.narrowed, list(predicted)))


def _measured(job: Job, model: nn.Module, cut: Cut, names: list[str]) -> dict[str, HeldOutLoss]:
    images = job.inputs.split.validation
    source = Source(len(images), memory_format=job.network.memory_format)
    recipe = job.recipe(job.config.schemes_in_play)
    loaded = job.loader.batches(images)
    tracked = job.track(loaded, "check", len(loaded))
    return held_out_losses(cut, (job.network.model, model), names, tracked, (source, recipe))


def _same(first: list[Choice], second: list[Choice]) -> bool:
    def made(choices: list[Choice]) -> list[tuple[object, ...]]:
        return [(c.scheme, c.ranks, c.width) for c in choices]

    return made(first) == made(second)
