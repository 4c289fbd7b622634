"""The end metric of two networks on the same images, and how their outputs differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from compress.data import Batches, ImageSet, Loader, check_labels
from compress.errors import CompressError, DataError, ModelError, what_raised
from compress.inputs.functions import Metric
from compress.measure.by_task import ByTask
from compress.measure.outputs import Comparison, results
from compress.measure.paired import compare_logits
from compress.progress import Track, silent
from compress.result import CustomMetric, EndMetric
from compress.running.forward import evaluation_mode
from compress.running.outputs import Reading
from compress.running.structure import size
from compress.tasks import TaskMeasure

# What an original gives on images that many networks are judged on is kept up to so many bytes.
KEPT_BYTES = 1 << 29
# Beside a metric of the user's own, outputs are compared on so many images.
IMAGES_BESIDE = 256


OWN_METRIC = (
    "Pass --task, such as --task segmentation or --task detection, or --metric-fn "
    "package.module:function, which takes the model and the batches and returns a number (higher "
    "is better)."
)


def require_ranked(reading: Reading, instead: str = OWN_METRIC) -> None:
    """Raise `ModelError` for outputs that accuracy cannot be measured by, saying what to do."""
    if not reading.ranked:
        raise ModelError(
            f"The model's outputs are no logits of one class an image ({reading.why}), so accuracy "
            f"cannot be measured. {instead}"
        )


@dataclass(frozen=True)
class Yardstick:
    """What networks are compared by.

    Attributes:
        loader: How images reach them.
        metric: A measure of the user's own or of a task, for networks that are not classifiers;
            None for accuracy.
        track: Progress.
        reading: What the outputs stand for; by default what the original's first look like.
        labels_fit: Whether labels that are no classes of the outputs are an error. Those of
            calibration images may be anything, and only count where they fit.
    """

    loader: Loader
    metric: Metric | TaskMeasure | None = None
    track: Track = silent
    reading: Reading | None = None
    labels_fit: bool = True

    def results(self, model: nn.Module, images: ImageSet, describe: str) -> Iterator[Any]:
        """What a model returns for each batch; see `results`."""
        return results(model, self.loader.batches(images), describe, self.track)

    def known(self, original: nn.Module, images: ImageSet, describe: str) -> list[Any] | None:
        """What an original returns, to be handed to `compare` often; None where it is too much."""
        kept: list[Any] = []
        for result in self.results(original, images, describe):
            kept.append(result)
            if size(result) * len(self.loader.batches(images)) > KEPT_BYTES:
                return None
        return kept

    def compare(
        self,
        before: nn.Module,
        after: nn.Module,
        images: ImageSet,
        describe: str = "test",
        known: Iterable[Any] | None = None,
    ) -> EndMetric:
        """Compare two models on the same images: accuracy, agreement, flips, intervals.

        Args:
            before: The original.
            after: The compressed model, as it will be saved.
            images: What to compare them on.
            describe: What the images are, for the progress bar.
            known: What the original returns for each batch, where that is known already.

        Raises:
            DataError: Labels that do not fit the outputs, or a set that accuracy says nothing
                about.
        """
        if isinstance(self.metric, TaskMeasure):
            by_task = ByTask(self.metric, self.loader, self.track, self.reading)
            return by_task.compare(before, after, images, describe, known)
        if self.metric is not None:
            return self._measured(self.metric, before, after, images, describe)
        first = self.results(before, images, f"{describe}: original") if known is None else known
        second = self.results(after, images, f"{describe}: compressed")
        comparison = Comparison(self.reading)
        comparison.add_all(first, second)
        if not comparison.ranked:
            return comparison.metric()
        logits = comparison.logits()
        classes = logits[0].shape[1]
        labelled = min(images.labels) >= 0
        if labelled and self.labels_fit:
            check_labels(images, classes)
        labelled = labelled and max(images.labels) < classes
        found = compare_logits(
            *logits,
            torch.tensor(images.labels) if labelled else None,
            images.classes if len(images.classes) == classes else None,
            [images.name(i) for i in range(len(images))],
        )
        return replace(found, outputs=comparison.outputs())

    def _measured(
        self,
        metric: Metric,
        before: nn.Module,
        after: nn.Module,
        images: ImageSet,
        describe: str,
    ) -> EndMetric:
        """Compare two models by a measure of the user's own."""
        loaded = self.loader.batches(images)
        values = [custom_value(metric, model, loaded) for model in (before, after)]
        some = images.subset(range(min(len(images), IMAGES_BESIDE)))
        comparison = Comparison(self.reading, beside=True)
        comparison.add_all(
            self.results(before, some, f"{describe}: original"),
            self.results(after, some, f"{describe}: compressed"),
        )
        return EndMetric(
            images=len(images),
            custom=CustomMetric(metric.name, values[0], values[1]),
            drop=values[0] - values[1],
            outputs=comparison.outputs(),
        )


def custom_value(metric: Metric, model: nn.Module, loaded: Batches) -> float:
    """What a user's own measure gives; the model is left as it was.

    Raises:
        ModelError: The measure fails, or gives no finite number.
    """
    try:
        with evaluation_mode(model):
            found = metric.function(model, loaded)
            numbers = getattr(found, "shape", ())
            if math.prod(numbers) != 1:
                raise ModelError(
                    f"--metric-fn {metric.name} gave {math.prod(numbers)} numbers "
                    f"({list(numbers)}); let it return one, such as their mean."
                )
            value = float(found)
    except (CompressError, KeyboardInterrupt):
        raise  # images that cannot be read, which it says; or the user's wish
    except BaseException as error:  # the user's function may raise anything, also SystemExit
        raise ModelError(
            f"--metric-fn {metric.name} raised {what_raised(error)}; it is called with the model "
            "and its batches, and returns a number (higher is better)."
        ) from error
    if not math.isfinite(value):
        raise ModelError(f"--metric-fn gave {value}; it must return a finite number.")
    return value


def require_labels(images: ImageSet) -> None:
    """Raise `DataError` where a test set has no labels to be right about."""
    if min(images.labels, default=-1) < 0:
        raise DataError(
            f"{images.source.described} has no labels that are class numbers, so accuracy cannot "
            "be measured on it; pass a folder with one folder per class, or arrays with 'labels', "
            "or a measure of your own (--metric-fn)."
        )
