"""The end metric of two networks on the same images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.data import Batches, ImageSet, Loader, check_labels
from compress.errors import CompressError, DataError, ModelError, what_raised
from compress.inputs.functions import Metric
from compress.measure.paired import compare_logits
from compress.progress import Track, silent
from compress.result import CustomMetric, EndMetric
from compress.running.finite import check_finite
from compress.running.forward import evaluation_mode, run_model
from compress.running.outputs import to_logits


def all_logits(model: nn.Module, inputs: Batches, describe: str, track: Track = silent) -> Tensor:
    """Outputs of a model on all images, float32 on the CPU ``[images, classes]``.

    Raises:
        ModelError: The outputs are not logits, or not finite.
    """
    reference = next(model.parameters())
    found, seen = [], 0
    with torch.inference_mode(), evaluation_mode(model):
        for images, _ in track(inputs, describe, len(inputs)):
            images = images.to(reference)
            output = run_model(model, images)
            require_logits(output)
            check_finite(
                model, images, output, f"on the images from number {seen} ({describe})",
                "check these images, the checkpoint and the normalisation (--mean, --std)",
            )  # fmt: skip
            seen += len(images)
            found.append(output.float().cpu())
    return torch.cat(found)


def require_logits(output: Tensor) -> None:
    """Raise `ModelError` for outputs that accuracy cannot be measured by."""
    if output.dim() != 2:
        raise ModelError(
            f"The model's output has shape {tuple(output.shape)} and is not a batch of logits, so "
            "accuracy cannot be measured. Pass --metric-fn package.module:function, which takes "
            "the model and the batches and returns a number (higher is better)."
        )


@dataclass(frozen=True)
class Yardstick:
    """What networks are compared by.

    Attributes:
        loader: How images reach them.
        metric: A measure of the user's own, for networks that are not classifiers; None for
            accuracy.
        track: Progress.
    """

    loader: Loader
    metric: Metric | None = None
    track: Track = silent

    def logits(self, model: nn.Module, images: ImageSet, describe: str) -> Tensor:
        """Outputs of a model on all images; see `all_logits`."""
        return all_logits(model, self.loader.batches(images), describe, self.track)

    def compare(
        self,
        before: nn.Module,
        after: nn.Module,
        images: ImageSet,
        describe: str = "test",
        before_logits: Tensor | None = None,
    ) -> EndMetric:
        """Compare two models on the same images: accuracy, agreement, flips, intervals.

        Args:
            before: The original.
            after: The compressed model, as it will be saved.
            images: What to compare them on.
            describe: What the images are, for the progress bar.
            before_logits: The original's outputs, where they are known already.

        Raises:
            DataError: Labels that do not fit the outputs, or a set that accuracy says nothing
                about.
        """
        if self.metric is not None:
            loaded = self.loader.batches(images)
            values = [custom_value(self.metric, model, loaded) for model in (before, after)]
            custom = CustomMetric(self.metric.name, values[0], values[1])
            return EndMetric(images=len(images), custom=custom, drop=values[0] - values[1])
        if before_logits is None:
            before_logits = self.logits(before, images, f"{describe}: original")
        after_logits = self.logits(after, images, f"{describe}: compressed")
        classes = before_logits.shape[1]
        labelled = min(images.labels) >= 0
        if labelled:
            check_labels(images, classes)
        names = images.classes if len(images.classes) == classes else None
        logits = to_logits(before_logits)
        return compare_logits(
            logits(before_logits),
            logits(after_logits),
            torch.tensor(images.labels) if labelled else None,
            names,
            [images.name(i) for i in range(len(images))],
        )


def custom_value(metric: Metric, model: nn.Module, loaded: Batches) -> float:
    """What a user's own measure gives; the model is left as it was.

    Raises:
        ModelError: The measure fails, or gives no finite number.
    """
    try:
        with evaluation_mode(model):
            value = float(metric.function(model, loaded))
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
