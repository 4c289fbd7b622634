"""The course itself: steps, checks on held-out images, the best state kept.

At every check held-out images judge the average over the last steps. What is given back is the best
state met, the one at the start included, so that nothing comes out worse than it went in.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.data import Loader
from compress.linalg.steps import Steps, falling, operations_for
from compress.progress import Track, note, silent
from compress.recover.distance import Distance
from compress.recover.features import Features
from compress.recover.lessons import Division, Lessons, Right, come_again, taught
from compress.running.forward import (
    backward,
    changes_allowed,
    evaluation_mode,
    run_model,
    run_with_gradients,
)
from compress.running.memory_format import put_in_format
from compress.running.precision import Forward, in_mixed_precision
from compress.running.structure import checksum, count, placed
from compress.running.structure import size as bytes_of
from compress.vision.augment import MOVED, NONE, augmented

WARM_UP = 100
# A course is judged so often, or less often where that would take more than this share of learning.
CHECKS, CHECKING = 20, 0.1
# After so many steps back the course ends with its best state.
MOST_STEPS_BACK = 3
# How many times the start's distance the held-out images may get to before a step back.
LOST = 1.5
# The original's results for the held-out images are kept up to so many bytes.
HELD_BYTES = 1 << 28


@dataclass(frozen=True)
class Task:
    """What there is to do, put together once.

    Attributes:
        original: The network to learn from, on the loader's device and in its memory format.
        division: Images to learn from and to judge by.
        loader: How they reach the networks.
        distance: What a network is trained and judged by.
        keep: Names of modules and parameters that stay as they are, with all that is below.
        seed: Decides all that is drawn.
        track: Progress.
        in_place: As `compress.network.baseline.Network`.
        macs: Of the original, for an image.
    """

    original: nn.Module
    division: Division
    loader: Loader
    distance: Distance
    keep: frozenset[str] = frozenset()
    seed: int = 0
    track: Track = silent
    in_place: bool = False
    macs: int = 0


@dataclass(frozen=True)
class Length:
    """How long a course is: in steps, or in seconds from which the number of steps follows."""

    steps: int | None = None
    seconds: float | None = None


@dataclass
class State:
    """All that decides how a course goes on, beside weights and images.

    Attributes:
        rate: Of the steps; a step back halves it.
        augmentation: How pictures are changed.
        features: What a mean squared error of features on the way counts, by place.
        mixed: Whether both networks compute in mixed precision while one learns; what is held out
            is always judged in full.
        planned: How many steps there may be, which decides the batches.
        total: How many there are to be by now.
        step: How many were begun.
        way: The share of the course that is behind, in (0, 1).
        start: The held-out images' distance at the start.
        best: The least that was met.
        best_step: When that was.
        steps_back: How often the course had to go back.
        length: The running average of the gradients' length.
        taken: The steps since the last step back.
        curve: Each check: the step, and the held-out images' distance.
        seconds: What was spent, by what it was spent on, ``"all"`` among them.
    """

    rate: float
    augmentation: str
    planned: int
    total: int
    mixed: bool = False
    features: dict[str, float] = field(default_factory=dict)
    step: int = 0
    way: float = 0.0
    start: float = math.nan
    best: float = math.nan
    best_step: int = 0
    steps_back: int = 0
    length: float = 0.0
    taken: int = 0
    curve: tuple[tuple[int, float], ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


Kept = Mapping[str, Tensor]
Keep = Callable[[State, Kept], None]


class Jury:
    """The held-out images, and what the original makes of them.

    Where pictures are changed to be learnt from, half of those held out are moved too: as they are,
    a trained original knows them too well to tell much about pictures that it never saw.

    Args:
        task: What there is to do.
        kind: How pictures are changed to be learnt from.
    """

    def __init__(self, task: Task, kind: str = NONE) -> None:
        self._task, self._kind = task, kind
        self._taught: list[tuple[int, Any]] | None = None

    def distance(self, model: nn.Module) -> float:
        """How far a network's outputs are from the original's, the mean over images.

        Raises:
            DataError: An image cannot be read.
            ModelError: A forward fails.
        """
        total, images = 0.0, 0
        kept: list[tuple[int, Any]] = []
        task, held = self._task, self._task.division.held_out
        for number, (given, _) in enumerate(task.loader.batches(held)):
            shown = self._shown(given, number)
            inputs = placed(shown, task.loader.device, task.loader.memory_format)
            same = 0 if come_again(held) else checksum(shown)
            right = self._known(number, same)
            if right is None:
                right = taught(task.original, inputs, task.distance)
            if bytes_of(right) * len(held) <= HELD_BYTES * count(inputs):
                kept.append((same, right))
            with torch.no_grad(), evaluation_mode(model):
                result = run_model(model, inputs)
                total += float(task.distance.held_out(right, result, count(inputs)).sum())
            images += count(inputs)
        if len(kept) == len(task.loader.batches(held)):
            self._taught = kept
        return max(total / images, 0.0)  # rounding can leave less than nothing

    def _known(self, number: int, same: int) -> Any:
        """What the original gave for a batch, where it was kept and the batch is the same."""
        found = None if self._taught is None else self._taught[number]
        return found[1] if found is not None and found[0] == same else None

    def _shown(self, inputs: Any, number: int) -> Any:
        """A batch as it is shown to both networks."""
        if self._kind == NONE:
            return inputs
        if len(inputs) == 1:  # pictures of different sizes come alone
            return augmented(inputs, MOVED, number) if number % 2 else inputs
        plain = len(inputs) - len(inputs) // 2
        return torch.cat([inputs[:plain], augmented(inputs[plain:], MOVED, number)])


def interval(steps: int, task: Task) -> int:
    """How many of a course's steps there are between checks."""
    division = task.division
    batch = min(task.loader.batch_size, len(division.learning))
    # Learning takes some three times the operations of judging, which is a forward alone.
    least = math.ceil(len(division.held_out) / (3 * CHECKING * batch))
    return max(1, steps // CHECKS, min(least, steps))


def learner(model: nn.Module, task: Task) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return a copy of a network that can learn, and its parameters that may, by name.

    Parameters of the original that require no gradients are constants, unless most of the network
    requires none, as one that was frozen to be used. What was made of them learns nevertheless.
    """
    copied = copy.deepcopy(model).float()
    put_in_format(copied, task.loader.memory_format)
    # A tied weight is kept by whichever of its names.
    kept = {
        id(parameter)
        for name, parameter in copied.named_parameters(remove_duplicate=False)
        if any(name == k or name.startswith(f"{k}.") for k in task.keep)
    }
    real = {n: p for n, p in copied.named_parameters() if p.is_floating_point()}
    numbers = sum(p.numel() for p in real.values())
    if 2 * sum(p.numel() for p in real.values() if p.requires_grad) > numbers:
        fixed = {n: p.shape for n, p in task.original.named_parameters() if not p.requires_grad}
        kept |= {id(p) for n, p in real.items() if not p.requires_grad and fixed.get(n) == p.shape}
    for parameter in real.values():
        parameter.requires_grad_(id(parameter) not in kept)
    return copied, {n: p for n, p in real.items() if id(p) not in kept and p.numel()}


@dataclass
class Course:
    """A network that learns.

    Attributes:
        task: What there is to do.
        model: The network, changed as it learns; see `learner`.
        weights: Its parameters that learn.
        state: Where it stands.
        jury: Who judges it.
    """

    task: Task
    model: nn.Module
    weights: dict[str, nn.Parameter]
    state: State
    jury: Jury

    def __post_init__(self) -> None:
        self._features = Features(self.state.features)
        self._steps = self._first_steps()
        self._best = {name: w.detach().clone() for name, w in self.weights.items()}

    def run(self, length: Length, keep: Keep | None = None) -> None:
        """Go on to the end; `best` is what came of it.

        Args:
            length: How long the whole course may take.
            keep: Called now and then, and after every check, with all that it takes to go on
                from there.

        Raises:
            DataError: An image cannot be read.
            ModelError: A forward fails.
        """
        state = self.state
        every, often = interval(state.total, self.task), max(1, state.total // CHECKS)
        lessons = self.lessons()
        before = state.seconds.get("all", 0.0)
        begun = time.perf_counter()
        bar = self.task.track(
            lessons.begin(state.step), "recover", max(state.total - state.step, 0)
        )
        note(bar, self._said())
        for inputs, right in bar:
            if state.step >= state.total or state.steps_back > MOST_STEPS_BACK:
                break
            # One that fails counts too: what comes next is the next batch, also after a stop.
            done = self.step(inputs, right)
            state.step += 1
            if not done:
                self._step_back()
            elif state.step % every == 0:
                self._check()
            if not done or state.step % often == 0 or state.step % every == 0:
                state.seconds["all"] = before + time.perf_counter() - begun
                state.seconds |= lessons.seconds
                self._replan(length)
                if keep is not None:
                    keep(state, self.tensors())
                note(bar, self._said())
        if state.step not in dict(state.curve):
            self._check()
        state.seconds["all"] = before + time.perf_counter() - begun
        state.seconds |= lessons.seconds

    def lessons(self) -> Lessons:
        """What it learns from."""
        task, state = self.task, self.state
        found = Lessons(
            task.division.learning, task.loader, task.original, task.distance,
            state.augmentation, task.seed, state.planned, state.mixed, self._features,
        )  # fmt: skip
        found.seconds |= {k: v for k, v in state.seconds.items() if k in found.seconds}
        return found

    def step(self, inputs: Any, right: Right) -> bool:
        """Take one step; say whether that went, which it does not where numbers are not finite."""
        state, distance = self.state, self.task.distance
        for weight in self.weights.values():
            weight.grad = None
        allowed = changes_allowed(in_place=self.task.in_place)
        forward: Forward = run_with_gradients
        if state.mixed:
            forward = in_mixed_precision(forward, self.task.loader.device)
        with torch.enable_grad(), evaluation_mode(self.model), allowed:
            with self._features.seen(self.model) as features:
                result = forward(self.model, inputs)
            loss = distance.training(right.outputs, result, count(inputs))
            # A multiple of what the outputs come to by now; in the end these alone count.
            multiple = (1 - state.way) * self._features.apart(right.features, features)
            loss = loss + loss.detach().abs() * multiple
            if not bool(loss.isfinite()):
                return False
            backward(loss)
        warm = min(1.0, (self._steps.taken + 1) / max(1, min(WARM_UP, state.planned // 10)))
        if not self._steps.step(state.rate * warm * falling(state.way)):
            return False
        state.way += (1 - state.way) / max(state.total - state.step, 1)
        return True

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that it takes to go on; the state's numbers are brought up to date."""
        self.state.length, self.state.taken = self._steps.length, self._steps.taken
        best = {f"best:{name}": tensor for name, tensor in self._best.items()}
        # As precise as they are, or steps would go on otherwise than without a stop.
        sizes = {
            f"size:{n}": torch.tensor(s, dtype=torch.float64) for n, s in self._steps.sizes.items()
        }
        return {**self._steps.tensors(), **best, **sizes}

    def load(self, tensors: Kept) -> None:
        """Go on from what `tensors` gave, with the state that belongs to it."""
        self._steps.load(tensors, self.state.length, self.state.taken)
        self._steps.sizes = {n: float(tensors[f"size:{n}"]) for n in self._steps.sizes}
        for name, tensor in self._best.items():
            tensor.copy_(tensors[f"best:{name}"])

    def best(self) -> nn.Module:
        """A copy of the network in the best state met."""
        copied = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, weight in copied.named_parameters():
                if name in self._best:
                    weight.copy_(self._best[name])
        return copied

    def _check(self) -> None:
        """Judge the average over the last steps; keep it where it is the best, or step back."""
        state = self.state
        with self._averaged():
            found = self.jury.distance(self.model)
        state.curve += ((state.step, found),)
        if found < state.best:
            state.best, state.best_step = found, state.step
            self._best = {name: t.clone() for name, t in self._steps.averages.items()}
        elif not found <= LOST * state.start:
            self._step_back()

    def _step_back(self) -> None:
        """Go on from the best state, in steps half as large."""
        self._load(self._best)
        sizes = self._steps.sizes
        self._steps = self._first_steps()
        self._steps.sizes = sizes
        self.state.rate /= 2
        self.state.steps_back += 1

    def _first_steps(self) -> Steps:
        """Steps from the weights as they are."""
        macs = self.task.macs * self.lessons().batch_size
        return Steps.begin(self.weights, operations_for(macs))

    def _replan(self, length: Length) -> None:
        """Fit the number of steps to the time that is left, where it is given."""
        state = self.state
        if length.seconds is None or not state.step:
            return
        left = length.seconds - state.seconds["all"]
        spent = state.seconds["all"] - state.seconds.get("search", 0.0)
        each = max(spent / state.step, 1e-9)
        wanted = state.step + max(int(left / each), 0)
        if abs(wanted - state.total) > 0.1 * (state.total - state.step):
            # Not more than planned: beyond that there are no batches.
            state.total = max(min(wanted, state.planned), state.step)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        own = {name: weight.data.clone() for name, weight in self.weights.items()}
        self._load(self._steps.averages)
        try:
            yield
        finally:
            self._load(own)

    def _load(self, tensors: Kept) -> None:
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[name])

    def _said(self) -> str:
        return f"held-out {self.state.best:.3g} (was {self.state.start:.3g})"
