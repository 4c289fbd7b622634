"""How fast and how precisely to go, and how to change pictures: found by trials on the images.

Every trial is a small course from the same start, and held-out images judge it. A short trial
cannot show what changed pictures are for, which is that few images are not learnt by heart; so they
are used unless they are clearly in the way of the held-out images as they are. A course too short
to look for a rate takes a usual one, matches nothing but outputs, and leaves pictures as they are
if it sees each only a few times.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import GradientError, ModelError
from compress.recover.course import Course, Jury, Length, State, Task, interval, learner
from compress.recover.features import Features, shared
from compress.recover.lessons import repeats
from compress.running.precision import computes_in_bfloat16
from compress.vision.augment import NONE, PASTED, are_pictures

# Steps relative to each weight's size, from the largest down.
RATES = (0.01, 0.003, 0.001, 0.0003)
USUAL = 0.001
# A trial has little time to settle, and so speaks for steps that are too small for a whole course:
# the largest are taken with which it does not end so much farther away than the nearest one.
NEAR = 0.04
# Features take time, and may end up in the way of the outputs: they are matched only where the
# network comes so many times as far with them in a trial.
FASTER = 1.25
# Each trial takes this share of all steps, and so many.
TRIAL_SHARE = 1 / 40
SHORTEST_TRIAL, LONGEST_TRIAL = 10, 100
# Courses of fewer steps are too short for any trial. Those too short for trials of the rate only
# try changed pictures, and only if they see each so many times.
SHORTEST_TRIED, BY_HEART = 100, 8
# How much worse a trial with changed pictures may come out.
WORTH = 0.1
# Mixed precision serves from so many multiply-accumulates a batch; before that the conversions cost
# more. Its gradient must have this cosine at least with that in full precision. Those of two
# batches differ far more, but as the networks come nearer, what is rounded off counts for more.
WORTH_MIXING, ALIGNED = 1e8, 0.97
# How many steps are timed, and how many times as many as fit by that there may be.
TIMED = 3
SPARE = 1.5


def begin(model: nn.Module, task: Task, length: Length) -> Course:
    """Find rate and augmentation by trials, and set a course up.

    Args:
        model: The network as it is; it is left so.
        task: What there is to do.
        length: How long all of it may take, trials included.

    Raises:
        DataError: An image cannot be read.
        ModelError: A forward fails, or the outputs cannot be compared.
    """
    begun = time.perf_counter()
    first, _ = next(iter(task.loader.batches(task.division.learning)))
    suited = PASTED if are_pictures(first) else NONE
    jury = Jury(task)
    ways = _Ways(suited, features=_features(model, task, suited))
    ways, pace = replace(ways, mixed=_mixed(model, task, ways)), None
    if length.steps is None:
        ways, pace = _faster(model, task, jury, ways)

    def steps_left() -> int:
        if pace is None:
            return length.steps or 1
        left = (length.seconds or 0.0) - (time.perf_counter() - begun)
        return _steps_in(left, pace, task, ways.features)

    rate, ways = _found(model, task, jury, steps_left(), ways)
    if ways.kind != NONE:
        jury = Jury(task, ways.kind)
    start = jury.distance(model)
    steps = steps_left()
    spent = time.perf_counter() - begun
    # The first steps are the slowest: there are batches for more than fit as far as is known.
    planned = steps if pace is None else math.ceil(SPARE * steps)
    state = ways.state(rate, steps, planned)
    state.start, state.best, state.curve = start, start, ((0, start),)
    state.seconds = {"search": spent, "all": spent}
    return _course(model, task, jury, state)


@dataclass(frozen=True)
class _Ways:
    """How a network may learn.

    Attributes:
        kind: How pictures are changed.
        features: What is compared on the way.
        mixed: Whether networks compute in mixed precision.
    """

    kind: str
    features: Features
    mixed: bool = False

    def state(self, rate: float, steps: int, planned: int | None = None) -> State:
        """Where a course of so many steps begins."""
        features = dict(self.features.weights)
        return State(rate, self.kind, planned or steps, steps, self.mixed, features)


def _course(model: nn.Module, task: Task, jury: Jury, state: State) -> Course:
    copied, weights = learner(model, task)
    return Course(task, copied, weights, state, jury)


def _found(
    model: nn.Module, task: Task, jury: Jury, steps: int, ways: _Ways
) -> tuple[float, _Ways]:
    """The rate, and the ways that suit, by as many trials as so many steps leave time for."""
    trials, outputs = _Trials(model, task, steps), replace(ways, features=Features())
    if steps < SHORTEST_TRIED or jury.distance(model) == 0:
        return USUAL, replace(outputs, kind=NONE)
    if int(steps * TRIAL_SHARE) >= SHORTEST_TRIAL:
        return _chosen(trials, ways)
    passes = steps * min(task.loader.batch_size / len(task.division.learning), 1)
    if ways.kind == NONE or passes < BY_HEART:
        return USUAL, replace(outputs, kind=NONE)
    return USUAL, _suitable(trials, outputs, USUAL, trials.after(USUAL, outputs))


def _features(model: nn.Module, task: Task, kind: str) -> Features:
    """What both networks compute on the way, as far as the first batch shows."""
    course = _course(model, task, Jury(task), State(0.0, kind, 1, 1))
    inputs, _ = next(course.lessons().begin(0))
    return shared(task.original, course.model, inputs)


def _mixed(model: nn.Module, task: Task, ways: _Ways) -> bool:
    """Whether the device is made for mixed precision, and gradients come out in it as they are."""
    batch = min(task.loader.batch_size, len(task.division.learning))
    if task.macs * batch < WORTH_MIXING or not computes_in_bfloat16(task.loader.device):
        return False
    full = _gradient(model, task, ways)
    try:
        mixed = _gradient(model, task, replace(ways, mixed=True))
    except (ModelError, GradientError):  # a forward may count on single precision
        return False
    if full is None or mixed is None:
        return False
    return float(F.cosine_similarity(full, mixed, dim=0)) >= ALIGNED


def _gradient(model: nn.Module, task: Task, ways: _Ways) -> Tensor | None:
    """The gradient for a first batch, each weight's as long as it is large; None if not finite."""
    course = _course(model, task, Jury(task), ways.state(0.0, 1))
    inputs, right = next(course.lessons().begin(0))
    if not course.step(inputs, right):
        return None
    slopes = [w.grad.flatten().double() for w in course.weights.values() if w.grad is not None]
    return torch.cat([s / s.norm().clamp_min(1e-300) * s.numel() ** 0.5 for s in slopes])


@dataclass(frozen=True)
class _Trials:
    """Small courses from the same start."""

    model: nn.Module
    task: Task
    steps: int

    def after(self, rate: float, ways: _Ways) -> nn.Module | None:
        """The network after a trial; None where it went astray."""
        steps = min(max(int(self.steps * TRIAL_SHARE), SHORTEST_TRIAL), LONGEST_TRIAL)
        course = _course(self.model, self.task, Jury(self.task), ways.state(rate, steps))
        for inputs, right in course.lessons().begin(0):
            if not course.step(inputs, right):
                return None
            course.state.step += 1
        return course.model


def _chosen(trials: _Trials, ways: _Ways) -> tuple[float, _Ways]:
    """The rate, the features and the augmentation that held-out images speak for."""
    jury = Jury(trials.task, ways.kind)
    tried: dict[float, tuple[float, nn.Module | None]] = {}
    usual = RATES.index(USUAL)
    # From the usual rate down as long as the network comes about as near, and then up.
    for rates in (RATES[usual:], RATES[usual::-1]):
        for rate in rates:
            if rate not in tried:
                tried[rate] = _judged(trials, jury, rate, ways)
            if tried[rate][0] > (1 + NEAR) * min(distance for distance, _ in tried.values()):
                break  # what lies beyond is farther still
    least = min(distance for distance, _ in tried.values())
    near = [r for r, (d, _) in tried.items() if d <= least * (1 + NEAR) < math.inf]
    rate = max(near, default=RATES[-1])
    distance, found = tried[rate]
    if ways.features.weights:
        without = replace(ways, features=Features())
        other, model = _judged(trials, jury, rate, without)
        start = jury.distance(trials.model)
        if start - distance < FASTER * (start - other):
            ways, found = without, model
    return rate, _suitable(trials, ways, rate, found)


def _judged(
    trials: _Trials, jury: Jury, rate: float, ways: _Ways
) -> tuple[float, nn.Module | None]:
    """How far away a network is after a trial, and the network."""
    found = trials.after(rate, ways)
    distance = math.inf if found is None else jury.distance(found)
    return (distance if distance < math.inf else math.inf), found


def _suitable(trials: _Trials, ways: _Ways, rate: float, found: nn.Module | None) -> _Ways:
    """With changed pictures, if a trial with them was not clearly worse than one without."""
    if ways.kind == NONE:
        return ways
    plain = replace(ways, kind=NONE)
    jury = Jury(trials.task)
    best, _ = _judged(trials, jury, rate, plain)
    changed = found is not None and jury.distance(found) <= best * (1 + WORTH)
    return ways if changed else plain


@dataclass(frozen=True)
class _Pace:
    """Seconds of a step, those of the original by themselves, and of a check."""

    original: float
    rest: float
    check: float

    @property
    def of_a_step(self) -> float:
        """Seconds of a step that the original runs at."""
        return self.original + self.rest


def _faster(model: nn.Module, task: Task, jury: Jury, ways: _Ways) -> tuple[_Ways, _Pace]:
    """The precision in which steps take less time, and their pace."""
    pace = _pace(model, task, jury, ways)
    if not ways.mixed:
        return ways, pace
    full = replace(ways, mixed=False)
    other = _pace(model, task, jury, full)
    return (ways, pace) if pace.of_a_step < other.of_a_step else (full, other)


def _pace(model: nn.Module, task: Task, jury: Jury, ways: _Ways) -> _Pace:
    """Time a few steps that lead nowhere."""
    course = _course(model, task, jury, ways.state(0.0, 1 + TIMED))
    lessons = course.lessons()
    begun, original = time.perf_counter(), 0.0
    for number, (inputs, right) in enumerate(lessons.begin(0)):
        course.step(inputs, right)
        if number == 0:  # whatever is made ready once is made ready now
            begun, original = time.perf_counter(), lessons.seconds["original"]
    spent = time.perf_counter() - begun
    original = lessons.seconds["original"] - original
    begun = time.perf_counter()
    jury.distance(model)
    check = time.perf_counter() - begun
    return _Pace(original / TIMED, max(spent - original, 0.0) / TIMED, check)


def _steps_in(seconds: float, pace: _Pace, task: Task, features: Features) -> int:
    """How many steps fit into some seconds, with the checks on the way; one at least."""
    batches = max(len(task.division.learning) // task.loader.batch_size, 1)
    steps = 1
    for _ in range(3):  # how often the original runs depends on how often batches come again
        passes = -(-steps // batches)
        new = min(max(1, -(-passes // repeats(features))) * batches, steps) / steps
        checks = steps / interval(steps, task) * pace.check
        steps = max(1, int((seconds - checks) / max(pace.rest + new * pace.original, 1e-9)))
    return steps
