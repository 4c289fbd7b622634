"""What a task is to this package, and what all of them need."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.errors import DataError, ModelError, one_line
from compress.libraries.record import quiet
from compress.result import CustomMetric
from compress.running.outputs import Part, Reading, listed_paths
from compress.running.structure import tensors
from compress.vision.torchvision import load_torchvision

EXTRA = "compress[metrics]"


@dataclass(frozen=True)
class Measure:
    """A figure that a task is judged by.

    Attributes:
        name: What it is called in reports.
        unit: ``"fraction"``, whose changes are in points; ``"dB"``; or empty, the target's own.
        lower_is_better: Whether a smaller value is the better one.
    """

    name: str
    unit: str = ""
    lower_is_better: bool = False

    def record(self, before: float, after: float) -> CustomMetric:
        """Return the figures of both networks as they stand in a result."""
        return CustomMetric(self.name, before, after, self.unit, self.lower_is_better)

    def drop(self, before: Any, after: Any) -> Any:
        """Return what was lost, in points of a fraction, else in the measure's own unit."""
        lost = after - before if self.lower_is_better else before - after
        return 100.0 * lost if self.unit == "fraction" else lost


@dataclass(frozen=True)
class Setup:
    """What a scorer is made for.

    Attributes:
        part: The output that is judged; None where all of the result is.
        targets: Those of some images of the set.
        ignore_index: The value of targets that are not to be judged.
    """

    part: Part | None
    targets: Sequence[Any]
    ignore_index: int

    def output(self, result: Any) -> Tensor:
        """Return the output that is judged.

        Raises:
            ModelError: The forward returns others than it did when they were read.
        """
        found, path = tensors(result), self.part.path if self.part else ""
        if path not in found:
            raise ModelError(
                f"The model's outputs change with its input: {path or 'a single tensor'} was among "
                f"them at first, and now there are {listed_paths(found)}. Let the forward return "
                "the same structure for every input."
            )
        return found[path]


class Scorer(ABC):
    """One network's results on a set of images, as they come in batches."""

    @abstractmethod
    def add(self, result: Any, targets: Any) -> None:
        """Take in what the forward returned for a batch ``[B, ...]``, and the batch's targets.

        Raises:
            DataError: The targets do not fit the outputs.
            ModelError: The outputs are not those that were read.
        """

    @abstractmethod
    def values(self) -> tuple[float | None, ...]:
        """Return the task's measures over all images; None for one that is not defined.

        Raises:
            DataError: The first of them is not defined on this set.
        """

    @property
    def width(self) -> int:
        """How many numbers an image adds to what is resampled."""
        return 1

    def each(self) -> Tensor | None:
        """Return the first measure of every image alone, ``[images]``; None where it has none."""
        return None

    def resampled(self, counts: Tensor) -> Tensor | None:
        """Return the first measure of sets in which images occur so often.

        Args:
            counts: ``[sets, images]`` in float64.

        Returns:
            ``[sets]``; None where it takes more than what each image adds.
        """
        del counts
        return None

    def by_class(self) -> tuple[tuple[int, float | None], ...]:
        """Return, of each class, how many images hold it and its own share of the measure."""
        return ()


class MeanScorer(Scorer):
    """A scorer whose first measure is the mean over the images."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def each(self) -> Tensor:
        """Return the first measure of every image alone, ``[images]``."""
        return torch.cat(self.rows).double()

    def resampled(self, counts: Tensor) -> Tensor:
        """Return the mean under the counts of each set, ``[sets]``."""
        return counts @ self.each() / counts.sum(1)


Accepts = Callable[[Any], bool]
Fits = Callable[[Tensor, Any], bool]


class Read(Protocol):
    """Says what the judged output is."""

    def __call__(self, path: str, output: Tensor, *, sigmoid: bool) -> Part:
        """Return the part, from its path, itself, and whether a sigmoid gives it."""
        ...


def as_values(path: str, output: Tensor, *, sigmoid: bool) -> Part:
    """Return an output as values, whatever it looks like."""
    del output, sigmoid
    return Part(path, "values")


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: As ``--task`` names it.
        measures: What it is judged by; the first decides.
        targets: What a set must give beside each image, in words.
        accepts: Whether a target of one image is such.
        looks_for: What the judged output is, in words; empty where all of the result is judged.
        fits: Whether an output ``[B, ...]`` may be the judged one, beside a target of one image
            (None where there is none that the task accepts).
        read: What that output stands for.
        scorer: Makes a scorer.
    """

    name: str
    measures: tuple[Measure, ...]
    targets: str
    accepts: Accepts
    looks_for: str
    fits: Fits
    read: Read
    scorer: Callable[[Setup], Scorer]

    def misfit(self, what: str) -> DataError:
        """Return the error of targets that are not what the task takes."""
        return DataError(f"--task {self.name} takes {self.targets}, and {what}.")


@dataclass(frozen=True)
class TaskMeasure:
    """What networks are judged by where the task says it.

    Attributes:
        task: The task.
        ignore_index: The value of targets that are not to be judged.
    """

    task: Task
    ignore_index: int = 255

    @property
    def first(self) -> Measure:
        """The measure that decides."""
        return self.task.measures[0]

    def scorer(self, reading: Reading, targets: Sequence[Any]) -> Scorer:
        """Return a scorer of a set of images.

        Args:
            reading: What the network's outputs stand for.
            targets: Those of some images of the set.

        Raises:
            ModelError: The packages that it needs are not installed.
            DataError: The targets cannot be judged by.
        """
        part = reading.parts[0] if reading.parts else None
        return self.task.scorer(Setup(part, targets, self.ignore_index))


def require_torchmetrics(task: str) -> Any:
    """Import torchmetrics.

    Raises:
        ModelError: It is not installed, or cannot be imported.
    """
    return require_package("torchmetrics", task)


def require_package(name: str, task: str) -> Any:
    """Import a package that the measures of a task need.

    Raises:
        ModelError: It is not installed, or cannot be imported.
    """
    try:
        with quiet():
            load_torchvision()  # which torchmetrics imports where it is there, and may need help
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"--task {task} needs the package {error.name}, which is not installed; install it "
            f"with pip install '{EXTRA}', or pass a measure of your own with --metric-fn."
        ) from error
    except Exception as error:  # whatever a package does while it is imported
        raise ModelError(
            f"--task {task} needs the package {name}, and importing it raised "
            f"{type(error).__name__}: {one_line(error)}. Install it anew with pip install "
            f"--upgrade '{EXTRA}', or pass a measure of your own with --metric-fn."
        ) from error
