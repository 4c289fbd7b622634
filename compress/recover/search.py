"""How fast and how precisely to go, and how to change pictures: found by trials on the images.

Every trial is a small course from the same start, and held-out images judge it. A short trial
cannot show what changed pictures are for, which is that few images are not learnt by heart; so they
are used unless they are clearly in the way of the held-out images as they are. A course too short
to look for a rate takes a usual one, and leaves pictures as they are if it sees each only a few
times.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import ModelError
from compress.recover.course import Course, Jury, Length, State, Task, interval, learner
from compress.recover.lessons import REPEATS
from compress.running.precision import computes_in_bfloat16
from compress.vision.augment import NONE, PASTED, are_pictures

# Steps relative to each weight's size, from the largest down.
RATES = (0.01, 0.003, 0.001, 0.0003)
USUAL = 0.001
# A trial has little time to settle, and so speaks for steps that are too small for a whole course:
# the largest are taken with which it does not end so much farther away than the nearest one.
NEAR = 0.04
# Each trial takes this share of all steps, and so many.
TRIAL_SHARE = 1 / 40
SHORTEST_TRIAL, LONGEST_TRIAL = 10, 100
# Courses of fewer steps are too short for any trial. Those too short for trials of the rate only
# try changed pictures, and only if they see each so many times.
SHORTEST_TRIED, BY_HEART = 100, 8
# How much worse a trial with changed pictures may come out.
WORTH = 0.1
# Mixed precision serves from so many multiply-accumulates a batch; before that the conversions cost
# more. The gradient in it points where the one in full precision does, up to so much of a right
# angle's cosine: gradients of two batches differ far more, and as the networks come nearer, what is
# rounded off counts for more.
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
    mixed, pace = _mixed(model, task), None
    if length.steps is None:
        paces = {way: _pace(model, task, jury, suited, mixed=way) for way in {False, mixed}}
        mixed = mixed and paces[True].of_a_step < paces[False].of_a_step
        pace = paces[mixed]

    def steps_left() -> int:
        if pace is None:
            return length.steps or 1
        return _steps_in((length.seconds or 0.0) - (time.perf_counter() - begun), pace, task)

    steps, rate, kind = steps_left(), USUAL, NONE
    if steps >= SHORTEST_TRIED and jury.distance(model) > 0:
        trials = _Trials(model, task, steps, mixed)
        passes = steps * min(task.loader.batch_size / len(task.division.learning), 1)
        if int(steps * TRIAL_SHARE) >= SHORTEST_TRIAL:
            rate, kind = _chosen(trials, suited)
        elif suited != NONE and passes >= BY_HEART:
            kind = _suitable(trials, suited, rate, trials.after(rate, suited))
    if kind != NONE:
        jury = Jury(task, kind)
    start = jury.distance(model)
    steps = steps_left()
    spent = time.perf_counter() - begun
    # The first steps are the slowest: there are batches for more than fit as far as is known.
    planned = steps if pace is None else math.ceil(SPARE * steps)
    state = State(rate, kind, planned, steps, mixed, start=start, best=start, curve=((0, start),))
    state.seconds = {"search": spent, "all": spent}
    return _course(model, task, jury, state)


def _course(model: nn.Module, task: Task, jury: Jury, state: State) -> Course:
    copied, weights = learner(model, task)
    return Course(task, copied, weights, state, jury)


def _mixed(model: nn.Module, task: Task) -> bool:
    """Whether the device is made for mixed precision, and gradients come out in it as they are."""
    batch = min(task.loader.batch_size, len(task.division.learning))
    if task.macs * batch < WORTH_MIXING or not computes_in_bfloat16(task.loader.device):
        return False
    full = _gradient(model, task, mixed=False)
    try:
        mixed = _gradient(model, task, mixed=True)
    except ModelError:  # a forward may mix numbers of types that it knows with others
        return False
    if full is None or mixed is None:
        return False
    return float(F.cosine_similarity(full, mixed, dim=0)) >= ALIGNED


def _gradient(model: nn.Module, task: Task, *, mixed: bool) -> Tensor | None:
    """The gradient for a first batch, each weight's as long as it is large; None if not finite."""
    course = _course(model, task, Jury(task), State(0.0, NONE, 1, 1, mixed))
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
    mixed: bool

    def after(self, rate: float, kind: str) -> nn.Module | None:
        """The network after a trial; None where it went astray."""
        steps = min(max(int(self.steps * TRIAL_SHARE), SHORTEST_TRIAL), LONGEST_TRIAL)
        state = State(rate, kind, steps, steps, self.mixed)
        course = _course(self.model, self.task, Jury(self.task), state)
        for inputs, right in course.lessons().begin(0):
            if not course.step(inputs, right):
                return None
            course.state.step += 1
        return course.model


def _chosen(trials: _Trials, kind: str) -> tuple[float, str]:
    """The rate and the augmentation that held-out images speak for."""
    jury = Jury(trials.task, kind)
    tried: dict[float, tuple[float, nn.Module | None]] = {}
    usual = RATES.index(USUAL)
    # From the usual rate down as long as the network comes about as near, and then up.
    for rates in (RATES[usual:], RATES[usual::-1]):
        for rate in rates:
            if rate not in tried:
                found = trials.after(rate, kind)
                distance = math.inf if found is None else jury.distance(found)
                tried[rate] = distance if distance < math.inf else math.inf, found
            if tried[rate][0] > (1 + NEAR) * min(distance for distance, _ in tried.values()):
                break  # what lies beyond is farther still
    least = min(distance for distance, _ in tried.values())
    near = [r for r, (d, _) in tried.items() if d <= least * (1 + NEAR) < math.inf]
    rate = max(near, default=RATES[-1])
    return rate, _suitable(trials, kind, rate, tried[rate][1])


def _suitable(trials: _Trials, kind: str, rate: float, found: nn.Module | None) -> str:
    """The augmentation, if a trial with it was not clearly worse than one without; else none."""
    if kind == NONE:
        return NONE
    jury, plain = Jury(trials.task), trials.after(rate, NONE)
    best = math.inf if plain is None else jury.distance(plain)
    return kind if found is not None and jury.distance(found) <= best * (1 + WORTH) else NONE


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


def _pace(model: nn.Module, task: Task, jury: Jury, kind: str, *, mixed: bool) -> _Pace:
    """Time a few steps that lead nowhere."""
    course = _course(model, task, jury, State(0.0, kind, 1 + TIMED, 1 + TIMED, mixed))
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


def _steps_in(seconds: float, pace: _Pace, task: Task) -> int:
    """How many steps fit into some seconds, with the checks on the way; one at least."""
    batches = max(len(task.division.learning) // task.loader.batch_size, 1)
    steps = 1
    for _ in range(3):  # how often the original runs depends on how often batches come again
        passes = -(-steps // batches)
        new = min(max(1, -(-passes // REPEATS)) * batches, steps) / steps
        checks = steps / interval(steps, task) * pace.check
        steps = max(1, int((seconds - checks) / max(pace.rest + new * pace.original, 1e-9)))
    return steps
