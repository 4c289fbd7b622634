"""Recovery as a stage: a course set up for a job, run, and recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from compress.data.held import hold
from compress.errors import ArtefactError, ConfigError, DataError
from compress.fit.layers import Replaced
from compress.inputs.functions import loss_function
from compress.modules.overparam import collapse, overparameterize
from compress.network.sites import LayerSite
from compress.pipeline.job import Job
from compress.plan import DENSE, Plan
from compress.recover import Course, Distance, Division, Keep, Length, Task, begin, divided
from compress.recover.course import Jury, learner
from compress.recover.store import Stored
from compress.result import Recovery, RecoveryCheck
from compress.running.memory_format import in_memory_format, put_in_format


@dataclass(frozen=True)
class Wish:
    """What a recovery is asked for.

    Attributes:
        minutes: How long it may take; None where the number of steps is given.
        steps: How many steps it takes.
        overparam: Depth of the chains that factors are trained as; 0 for the factors themselves.
        goal: Spec of the user's own summed loss ``(outputs, originals)``; empty for none.
    """

    minutes: float | None = None
    steps: int | None = None
    overparam: int = 0
    goal: str = ""

    @property
    def length(self) -> Length:
        """How long the course is."""
        return Length(self.steps, None if self.minutes is None else 60 * self.minutes)


def task_of(job: Job, division: Division, kept: frozenset[str], goal: str = "") -> Task:
    """What a course works on.

    Args:
        job: The job, whose baseline is what is learned from.
        division: Its images.
        kept: Names of layers that stay as they are.
        goal: As in `Wish`.

    Raises:
        ModelError: There is no such function, or nothing says how far the outputs are apart.
    """
    config, network = job.config, job.network
    function = loss_function(config.replace(loss_fn=goal, task="")) if goal else None
    distance = Distance(network.reading, function=function)
    distance.held_out(distance.taught(network.result), network.result)  # before any work
    return Task(
        network.model, division, job.loader, distance, kept, config.seed, job.track,
        network.in_place, network.macs,
    )  # fmt: skip


def check_recoverable(job: Job) -> None:
    """Find out whether a run's network will be able to learn, before hours of work.

    Raises:
        DataError: There are too few images, or it is not known which there are.
        ModelError: Nothing says how far the outputs are apart.
    """
    task_of(job, _division(job), frozenset())


def _division(job: Job) -> Division:
    images = job.inputs.images
    if images is None:
        raise DataError("No images given to learn from; pass --data SPEC.")
    return divided(images, job.config.calibration_images, job.config.seed)


def kept_by_user(
    sites: Iterable[LayerSite], settings: dict[str, Any], plan: Plan | None = None
) -> frozenset[str]:
    """Names of the layers that the user wants as they are.

    Args:
        sites: All layers.
        settings: The run's, of which ``keep`` and ``scheme`` count.
        plan: The plan that was carried out, where it is known.
    """
    globs = [*settings.get("keep", ()), *_dense(settings.get("scheme", {}))]
    locked = {c.name for c in plan.choices if c.locked} if plan is not None else set()
    return frozenset(
        alias
        for site in sites
        if site.name in locked or any(fnmatchcase(a, g) for a in site.aliases for g in globs)
        for alias in site.aliases
    )


def _dense(schemes: dict[str, str]) -> list[str]:
    return [glob for glob, scheme in schemes.items() if scheme == DENSE]


class Recovering:
    """A course on a network, from its start or from where it was stopped.

    Args:
        model: The compressed network, which is left as it is.
        task: What there is to do.
        wish: What is asked for.

    Raises:
        ConfigError: The chains would have too many numbers.
    """

    def __init__(self, model: nn.Module, task: Task, wish: Wish) -> None:
        self.task, self.wish = task, wish
        self._given = model
        self._start = _expanded(model, wish.overparam, task) if wish.overparam else model

    def begin(self) -> Course:
        """Set a course up, and find out how to go about it."""
        with in_memory_format(self.task.original, self.task.loader.memory_format):
            return begin(self._start, self.task, self.wish.length)

    def resumed(self, stored: Stored) -> Course:
        """A course that goes on from where it was stopped.

        Raises:
            ArtefactError: What was stored is of another network.
        """
        copied, weights = learner(self._start, self.task)
        jury = Jury(self.task, stored.state.augmentation)
        course = Course(self.task, copied, weights, stored.state, jury)
        try:
            course.load(stored.tensors)
        except (KeyError, RuntimeError) as error:
            raise ArtefactError(
                f"The state of the recovery is of another network ({error}); leave out --resume."
            ) from error
        return course

    def run(self, course: Course, keep: Keep | None = None) -> nn.Module:
        """Run a course to its end; return the network, the one given where none is better."""
        with in_memory_format(self.task.original, self.task.loader.memory_format):
            course.run(self.wish.length, keep)
        return self.found(course)

    def found(self, course: Course) -> nn.Module:
        """The best network of a course so far, of the structure of the one that was given."""
        if not course.state.best < course.state.start:
            return self._given
        model = course.best()
        plain = collapse(model) if self.wish.overparam else model
        put_in_format(plain, "contiguous")
        for parameter in plain.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return plain.eval()


# Chains may have so many times the numbers of the network.
MOST_NUMBERS = 1 << 28


def _expanded(model: nn.Module, depth: int, task: Task) -> nn.Module:
    """A copy whose layers, but for the kept ones, are chains that compute the same."""
    if depth < 2:
        raise ConfigError(f"overparam = {depth} is no depth of a chain; give 2 or more.")
    weights = [p for p in model.parameters() if p.dim() > 1]
    hidden = sum((depth - 1) * p.shape[0] ** 2 for p in weights)
    numbers = sum(p.numel() for p in weights) + hidden
    if numbers > MOST_NUMBERS:
        raise ConfigError(
            f"Chains of depth {depth} would hold {numbers:,} numbers, each of them kept five times "
            f"over while it learns, and at most {MOST_NUMBERS:,} are taken; give a smaller depth, "
            "or none."
        )
    plain = (nn.Linear, nn.Conv2d)
    # Subclasses of the layers cannot be chains, and learn as they are.
    kept = [
        module
        for name, module in model.named_modules()
        if name in task.keep or (isinstance(module, plain) and type(module) not in plain)
    ]
    expanded: nn.Module = overparameterize(model, depth=depth, ignore=kept, inplace=False)
    return expanded


def recorded(course: Course, wish: Wish, before: float | None) -> Recovery:
    """What is written down of a course.

    Args:
        course: The course.
        wish: What was asked for.
        before: The end metric's value without it.
    """
    state, division = course.state, course.task.division
    return Recovery(
        images=len(division.learning),
        held_out_images=len(division.held_out),
        steps=state.step,
        batch_size=course.lessons().batch_size,
        rate=state.rate,
        augmentation=state.augmentation,
        start=state.start,
        best=state.best,
        best_step=state.best_step,
        overparam=wish.overparam,
        steps_back=state.steps_back,
        before=before,
        checks=tuple(RecoveryCheck(step, distance) for step, distance in state.curve),
        seconds=dict(state.seconds),
    )


def value_of(job: Job, model: nn.Module) -> float | None:
    """The end metric's value of a network on the test images; None without any."""
    images = job.inputs.test
    if images is None:
        return None
    metric = job.yardstick.compare(job.network.original, model, images, "before recovery")
    return metric.custom.after if metric.custom is not None else metric.top1_after


def recovered_in_run(job: Job, plan: Plan, replaced: Replaced) -> tuple[Replaced, Recovery]:
    """Let a rewritten network learn from the original, as a stage of a run.

    Args:
        job: The run's, with its images.
        plan: What was done to each layer.
        replaced: What came of it.

    Raises:
        DataError: There are too few images, or one cannot be read.
        ModelError: Outputs cannot be compared.
    """
    found, wish = _division(job), Wish(minutes=job.config.recover)
    sets = (hold(images, job.loader, job.track) for images in (found.learning, found.held_out))
    kept = kept_by_user(job.network.sites, job.config.settings(), plan)
    recovering = Recovering(replaced.model, task_of(job, Division(*sets), kept), wish)
    before = value_of(job, replaced.model)
    course = recovering.begin()
    model = recovering.run(course)
    return dataclasses.replace(replaced, model=model), recorded(course, wish, before)
