"""Budgets that hold what they promise: predicted losses checked on images nobody has seen.

A layer's loss is predicted from the images that it is fitted to, and where these are few compared
with its numbers, it promises too much: a budget would choose it first. So what a budget chooses is
fitted, its layers are measured on the validation images, and those that lose clearly more than was
predicted are dearer from then on; the budget chooses again, until what it chooses keeps its
promise.

They are measured in two ways. `compress.calibrate.held_out` sees all images, but knows large errors
no better than the prediction does, which goes by the slope where there is none. Where the outputs
say how far they are apart, that is also measured on a few images, one layer rewritten at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from compress.calibrate.held_out import HeldOutLoss, held_out_losses, ratios
from compress.calibrate.statistics import Calibration, Source
from compress.choose import Budgets
from compress.fit.layers import Replaced
from compress.measure.assess import losses_alone
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
    return _Check(job, calibration)


@dataclass
class _Check:
    """Measures what choices lose; what stays as it was is not measured alone again."""

    job: Job
    calibration: Calibration
    _alone: dict[tuple[object, ...], HeldOutLoss] = field(default_factory=dict)

    def __call__(self, choices: list[Choice]) -> dict[str, float]:
        """How much more than predicted layers lose, by name; those that do not are left out."""
        job, config = self.job, self.job.config
        names = [c.name for c in choices if c.rewritten]
        if not names:
            return {}
        plan = Plan(config.rule, None, config.metric, tuple(choices), slices=config.slices)
        fitter = dataclasses.replace(job.fitter, refit=False)
        fitted = fitter.fit(plan, self.calibration)
        replaced = fitter.replace(fitted)
        predicted = {n: fitted.predicted[n].loss for n in names if n in fitted.predicted}
        measured = [_to_second_order(job, replaced.model, fitted.narrowed, list(predicted))]
        if config.metric == "loss" and not config.loss_fn:  # in other units they differ
            measured.append(self._by_themselves(replaced, [plan[n] for n in predicted]))
        return ratios(predicted, *measured)

    def _by_themselves(self, replaced: Replaced, choices: list[Choice]) -> dict[str, HeldOutLoss]:
        keys = {c.name: (c.name, *_made(c)) for c in choices}
        new = [name for name, key in keys.items() if key not in self._alone]
        images = self.job.inputs.split.validation
        found = losses_alone(self.job.network, replaced, new, images)
        self._alone |= {keys[name]: loss for name, loss in found.items()}
        return {name: self._alone[key] for name, key in keys.items() if key in self._alone}


def _to_second_order(
    job: Job, model: nn.Module, cut: Cut, names: list[str]
) -> dict[str, HeldOutLoss]:
    images = job.inputs.split.validation
    source = Source(len(images), memory_format=job.network.memory_format)
    recipe = job.recipe(job.config.schemes_in_play)
    loaded = job.loader.batches(images)
    tracked = job.track(loaded, "check", len(loaded))
    return held_out_losses(cut, (job.network.model, model), names, tracked, (source, recipe))


def _same(first: list[Choice], second: list[Choice]) -> bool:
    return [_made(c) for c in first] == [_made(c) for c in second]


def _made(choice: Choice) -> tuple[object, ...]:
    return choice.scheme, choice.ranks, choice.width
