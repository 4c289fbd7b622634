"""The end metric of two networks on the same images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress.config import RunConfig
from compress.data import Batches, ImageSet, batches, check_labels
from compress.errors import CompressError, DataError, ModelError
from compress.measure.paired import compare_logits
from compress.progress import Track, silent
from compress.result import CustomMetric, EndMetric
from compress.running.finite import check_finite
from compress.running.forward import evaluation_mode, run_model

MetricFunction = Callable[[nn.Module, Batches], float]


def all_logits(model: nn.Module, inputs: Batches, describe: str, track: Track = silent) -> Tensor:
    """Outputs of a model on all images, float32 on the CPU ``[images, classes]``.

    Raises:
        ModelError: The outputs are no logits, or not finite.
    """
    reference = next(model.parameters())
    found, seen = [], 0
    with torch.inference_mode(), evaluation_mode(model):
        for images, _ in track(inputs, describe, len(inputs)):
            images = images.to(reference)
            output = run_model(model, images)
            if output.dim() != 2:
                raise ModelError(
                    f"The model's output has shape {tuple(output.shape)} and is no batch of "
                    "logits, so accuracy cannot be measured. Pass --metric-fn "
                    "package.module:function, which takes the model and the batches and returns "
                    "a number (higher is better)."
                )
            check_finite(
                model, images, output, f"on the images from number {seen} ({describe})",
                "check these images, the checkpoint and the normalisation (--mean, --std)",
            )  # fmt: skip
            seen += len(images)
            found.append(output.float().cpu())
    return torch.cat(found)


def compare(
    before: nn.Module,
    after: nn.Module,
    images: ImageSet,
    config: RunConfig,
    *,
    batch_size: int,
    metric: MetricFunction | None = None,
    describe: str = "test",
    before_logits: Tensor | None = None,
    track: Track = silent,
) -> EndMetric:
    """Compare two models on the same images: accuracy, agreement, flips, intervals.

    Args:
        before: The original.
        after: The compressed model, as it will be saved.
        images: What to compare them on.
        config: Workers.
        batch_size: Images a batch.
        metric: A user's own measure for networks that are no classifiers.
        describe: What the images are, for the progress bar.
        before_logits: The original's outputs, where they are known already.
        track: Progress.

    Raises:
        DataError: Labels that do not fit the outputs, or a set that accuracy says nothing about.
    """
    loaded = batches(images, batch_size, config.workers)
    if metric is not None:
        name = config.metric_fn or getattr(metric, "__name__", "metric")
        values = [custom_value(metric, model, loaded) for model in (before, after)]
        custom = CustomMetric(name, values[0], values[1])
        return EndMetric(images=len(images), custom=custom, drop=values[0] - values[1])
    if before_logits is None:
        before_logits = all_logits(before, loaded, f"{describe}: original", track)
    after_logits = all_logits(after, loaded, f"{describe}: compressed", track)
    classes = before_logits.shape[1]
    labelled = min(images.labels) >= 0
    if labelled:
        check_labels(images, classes)
    names = images.classes if len(images.classes) == classes else None
    return compare_logits(
        before_logits,
        after_logits,
        torch.tensor(images.labels) if labelled else None,
        names,
        [images.name(i) for i in range(len(images))],
    )


def custom_value(metric: MetricFunction, model: nn.Module, loaded: Batches) -> float:
    """What a user's own measure gives; the model is left as it was.

    Raises:
        ModelError: The measure fails, or gives no finite number.
    """
    try:
        with evaluation_mode(model):
            value = float(metric(model, loaded))
    except CompressError:
        raise  # images that cannot be read, which it says
    except Exception as error:  # the user's function may raise anything
        raise ModelError(
            f"--metric-fn raised {type(error).__name__}: {' '.join(str(error).split())}; it is "
            "called with the model and its batches, and returns a number (higher is better)."
        ) from error
    if not math.isfinite(value):
        raise ModelError(f"--metric-fn gave {value}; it must return a finite number.")
    return value


def require_labels(images: ImageSet) -> None:
    """Raise `DataError` where a test set has no labels to be right about."""
    if min(images.labels, default=-1) < 0:
        raise DataError(
            f"{images.source.described} has no labels, so nothing can be verified on it; pass a "
            "folder with one folder per class, or arrays with 'labels'."
        )
