"""Recovery as a stage: a course set up for a job, run, and recorded."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from compress.data import Loader, first_inputs
from compress.data.held import hold
from compress.errors import ArtefactError, ConfigError, DataError, GradientError, ModelError
from compress.fit.layers import Replaced
from compress.inputs.functions import loss_function
from compress.modules.overparam import collapse, overparameterize
from compress.network.baseline import Network
from compress.network.chains import as_saved
from compress.pipeline.job import Job
from compress.plan import DENSE, Plan
from compress.recover import Course, Distance, Division, Keep, Length, Task, begin, divided
from compress.recover.course import Jury, learner
from compress.recover.lessons import taught
from compress.recover.store import Stored
from compress.result import Recovery, RecoveryCheck
from compress.running.forward import (
    backward,
    changes_allowed,
    evaluation_mode,
    run_with_gradients,
)
from compress.running.memory_format import in_memory_format, put_in_format
from compress.running.structure import count, placed, shapes

# Images that a detector is shown to see whether it always returns as many boxes.
TOLD_APART = 8


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
    # One that is not finite on the way is the course's to deal with; at first it is a mistake.
    function, strict = (
        loss_function(config.replace(loss_fn=goal), network.reading, finite=finite)
        if goal
        else None
        for finite in (False, True)
    )
    result = network.result
    first = Distance(network.reading, function=strict)
    first.held_out(first.taught(result), result, count(network.example))  # before any work
    distance = Distance(network.reading, function=function)
    task = Task(
        network.model, division, job.loader, distance, kept, config.seed, job.track,
        network.in_place, network.macs,
    )  # fmt: skip
    return dataclasses.replace(task, in_place=_in_place(task))


def _in_place(task: Task) -> bool:
    """Whether gradients only come where what the forward changes in place is copied.

    Raises:
        ConfigError: There is nothing to learn.
        GradientError: They do not come then either.
        ModelError: The forward fails, or the outputs cannot be compared.
    """
    model, weights = learner(task.original, task)
    if not weights:
        raise ConfigError("All weights are kept, so that there is nothing to learn; keep fewer.")
    given = first_inputs(task.division.learning, 1)
    inputs = placed(given, task.loader.device, task.loader.memory_format)
    right = taught(task.original, inputs, task.distance)
    for in_place in (task.in_place, True):
        with evaluation_mode(model), torch.enable_grad(), changes_allowed(in_place=in_place):
            result = run_with_gradients(model, inputs)
            loss = task.distance.training(right, result, count(inputs))
            try:
                backward(loss, ", or leave recovery out")
            except GradientError:
                if in_place:
                    raise
                continue
        return in_place
    return True  # for type checkers: the last turn has returned or raised


def check_recoverable(job: Job) -> None:
    """Find out whether a run's network will be able to learn, before hours of work.

    Raises:
        DataError: There are too few images, or it is not known which there are.
        GradientError: No gradients come through the network.
        ModelError: Nothing says how far the outputs are apart.
    """
    task, network = task_of(job, _division(job), frozenset()), job.network
    if network.reading.parts:
        return
    # As many boxes in one picture as in another are no sign that there always are as many.
    few = task.division.learning.subset(range(min(len(task.division.learning), TOLD_APART)))
    found = {
        str(shapes(taught(network.model, placed(inputs, network.device), task.distance)))
        for inputs, _ in Loader(1).batches(few)
    }
    if len(found) > 1:
        raise ModelError(
            "The number of outputs differs from image to image, as a detector's does, so that they "
            "cannot be compared in a run. Leave out --recover, and give the result to compress "
            "recover with --loss-fn package.module:function (outputs, originals) -> summed loss."
        )


def _division(job: Job) -> Division:
    images = job.inputs.images
    if images is None:
        raise DataError("No images given to learn from; pass --data SPEC.")
    return divided(images, job.config.calibration_images, job.config.seed)


def kept_by_user(
    network: Network, settings: dict[str, Any], plan: Plan | None = None
) -> frozenset[str]:
    """Names of the layers, and of all else with weights, that the user wants as they are.

    Args:
        network: The dense baseline.
        settings: The run's, of which ``keep`` and ``scheme`` count.
        plan: The plan that was carried out, where it is known.
    """
    globs = [*settings.get("keep", ()), *_dense(settings.get("scheme", {}))]
    locked = {c.name for c in plan.choices if c.locked} if plan is not None else set()
    layers = {
        alias
        for site in network.sites
        if site.name in locked or any(fnmatchcase(a, g) for a in site.aliases for g in globs)
        for alias in site.aliases
    }
    # Not whole blocks, of which a glob such as *.0 for layers may be the name as well.
    others = itertools.chain(
        (n for n, m in network.model.named_modules(remove_duplicate=False) if m._parameters),
        (n for n, _ in network.model.named_parameters(remove_duplicate=False)),
    )
    asked = {n for n in others if any(fnmatchcase(n, g) for g in settings.get("keep", ()))}
    return frozenset(layers | asked)


def _dense(schemes: dict[str, str]) -> list[str]:
    return [glob for glob, scheme in schemes.items() if scheme == DENSE]


class Recovering:
    """A course on a network, from its start or from where it was stopped.

    Args:
        model: The compressed network, which is left as it is.
        task: What there is to do.
        wish: What is asked for.
        dtype: What the network will be saved in.

    Raises:
        ConfigError: The chains would have too many numbers.
    """

    def __init__(
        self, model: nn.Module, task: Task, wish: Wish, dtype: torch.dtype = torch.float32
    ) -> None:
        self.task, self.wish, self.dtype = task, wish, dtype
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
            found = self.found(course)
            if found is self._given or self.dtype == torch.float32:
                return found
            # What is saved is rounded, which may undo what little was learned.
            start, best = (self._rounded(course, model) for model in (self._given, found))
        if best < start:
            return found
        course.state.best, course.state.best_step = course.state.start, 0
        return self._given

    def _rounded(self, course: Course, model: nn.Module) -> float:
        """The held-out images' distance of a network as it will be saved."""
        rounded = as_saved(model, self.dtype).float()
        put_in_format(rounded, self.task.loader.memory_format)
        return course.jury.distance(rounded)

    def found(self, course: Course) -> nn.Module:
        """The best network of a course so far, of the structure of the one that was given."""
        if not course.state.best < course.state.start:
            return self._given
        model = course.best()
        plain = collapse(model) if self.wish.overparam else model
        put_in_format(plain, "contiguous")
        given = dict(self._given.named_parameters())
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(given[name].requires_grad)
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
    # What chains are begun with is drawn from torch's own generator.
    with torch.random.fork_rng():
        torch.manual_seed(task.seed)
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
        features=tuple(state.features),
        precision="mixed" if state.mixed else "full",
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
    kept = kept_by_user(job.network, job.config.settings(), plan)
    task = task_of(job, Division(*sets), kept)
    recovering = Recovering(replaced.model, task, wish, job.inputs.dtype)
    before = value_of(job, replaced.model)
    course = recovering.begin()
    model = recovering.run(course)
    return dataclasses.replace(replaced, model=model), recorded(course, wish, before)
