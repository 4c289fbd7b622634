"""The end metric of two networks on the same images, and how their outputs differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.data import Batches, ImageSet, Loader, check_labels
from compress.errors import CompressError, DataError, ModelError, what_raised
from compress.inputs.functions import Metric
from compress.measure.paired import compare_logits
from compress.measure.spread import Spread, squared_error
from compress.progress import Track, silent
from compress.result import CustomMetric, EndMetric, OutputChange
from compress.running.finite import check_finite
from compress.running.forward import evaluation_mode, run_model
from compress.running.outputs import Part, Reading, read_outputs
from compress.running.structure import count, floating, like_weights, mapped, size

# What an original gives on images that many networks are judged on is kept up to so many bytes.
KEPT_BYTES = 1 << 29
# Beside a metric of the user's own, outputs are compared on so many images.
IMAGES_BESIDE = 256


def results(
    model: nn.Module, inputs: Batches, describe: str, track: Track = silent
) -> Iterator[Any]:
    """Yield what a model returns for each batch, on the CPU, real numbers in float32.

    Raises:
        ModelError: The forward fails, or gives NaN or infinite values.
    """
    reference, seen = next(model.parameters()), 0
    for given, _ in track(inputs, describe, len(inputs)):
        images = like_weights(given, reference)
        with torch.inference_mode(), evaluation_mode(model):
            result = run_model(model, images)
        check_finite(
            model, images, result, f"on the images from number {seen} ({describe})",
            "check these images, the checkpoint and the normalisation (--mean, --std)",
        )  # fmt: skip
        seen += count(images)
        yield mapped(result, lambda t: (t.float() if t.is_floating_point() else t).cpu())


def require_ranked(reading: Reading) -> None:
    """Raise `ModelError` for outputs that accuracy cannot be measured by."""
    if not reading.ranked:
        raise ModelError(
            f"The model's outputs are no logits of one class an image ({reading.why}), so accuracy "
            "cannot be measured. Pass --metric-fn package.module:function, which takes the model "
            "and the batches and returns a number (higher is better)."
        )


@dataclass(frozen=True)
class Yardstick:
    """What networks are compared by.

    Attributes:
        loader: How images reach them.
        metric: A measure of the user's own, for networks that are not classifiers; None for
            accuracy.
        track: Progress.
        reading: What the outputs stand for; by default what the original's first look like.
    """

    loader: Loader
    metric: Metric | None = None
    track: Track = silent
    reading: Reading | None = None

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
        if self.metric is not None:
            return self._measured(self.metric, before, after, images, describe)
        first = self.results(before, images, f"{describe}: original") if known is None else known
        second = self.results(after, images, f"{describe}: compressed")
        comparison = _Comparison(self.reading)
        comparison.add_all(first, second)
        if not comparison.ranked:
            return comparison.metric()
        logits = comparison.logits()
        classes = logits[0].shape[1]
        labelled = min(images.labels) >= 0
        if labelled:
            check_labels(images, classes)
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
        comparison = _Comparison(self.reading, beside=True)
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


@dataclass
class _Comparison:
    """Two networks' results, batch by batch.

    Attributes:
        reading: What the outputs stand for; by default what the original's first look like.
        beside: Whether a measure of the user's own decides, so that outputs that cannot be
            compared, as of detectors that find more or fewer things, are left out.
    """

    reading: Reading | None
    beside: bool = False
    images: int = 0
    changes: dict[str, _Change] = field(default_factory=dict)
    apart: set[str] = field(default_factory=set)
    rows: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    divergence: float = 0.0

    @property
    def ranked(self) -> bool:
        """Whether the outputs are logits, of which accuracy can be measured."""
        return self.reading is not None and self.reading.ranked

    def add_all(self, first: Iterable[Any], second: Iterable[Any]) -> None:
        """Compare all batches.

        Raises:
            ModelError: The networks return different structures.
        """
        for before, after in zip(first, second, strict=True):
            self.reading = self.reading or read_outputs(before)
            if not self.beside:
                self._judge(self.reading, before, after)
            self._compare(self.reading, floating(before), floating(after))

    def _judge(self, reading: Reading, before: Any, after: Any) -> None:
        expected, found = reading.outputs(before), reading.outputs(after)
        self.images += len(expected[0])
        if reading.ranked:
            self.rows[0].append(reading.scores(before))
            self.rows[1].append(reading.scores(after))
        elif reading.kind != "values":
            self.divergence += float(reading.parts[0].divergence(expected[0], found[0]).sum())

    def _compare(
        self, reading: Reading, before: dict[str, Tensor], after: dict[str, Tensor]
    ) -> None:
        parts = {part.path: part for part in reading.parts}
        for path, output in before.items():
            if path not in after or after[path].shape != output.shape:
                if not self.beside:
                    raise ModelError(
                        f"The compressed model's output {path or 'tensor'} has another shape than "
                        "the original's, so the two cannot be compared. Pass --metric-fn for a "
                        "measure of your own."
                    )
                self.apart.add(path)
                continue
            change = self.changes.setdefault(path, _Change(parts.get(path, Part(path, "values"))))
            change.add(output, after[path])

    def logits(self) -> tuple[Tensor, Tensor]:
        """Return the logits of both ``[images, classes]``."""
        return torch.cat(self.rows[0]), torch.cat(self.rows[1])

    def outputs(self) -> tuple[OutputChange, ...]:
        """Return how each output changed that could be compared in every batch."""
        known = [change for path, change in self.changes.items() if path not in self.apart]
        return tuple(change.record() for change in known if change.elements)

    def metric(self) -> EndMetric:
        """Return what is known without labels."""
        outputs = self.outputs()
        probable = self.reading is not None and self.reading.kind != "values"
        return EndMetric(
            images=self.images,
            agreement=next((o.agreement for o in outputs if o.agreement is not None), None),
            mean_kl=self.divergence / self.images if probable else None,
            outputs=outputs,
        )


@dataclass
class _Change:
    """Running sums of one output's change."""

    part: Part
    shape: tuple[int, ...] = ()
    spread: Spread = field(default_factory=Spread)
    squared: float = 0.0
    agreeing: int = 0
    judged: int = 0

    @property
    def elements(self) -> int:
        """How many numbers were compared."""
        return self.spread.elements

    def add(self, before: Tensor, after: Tensor) -> None:
        self.shape = tuple(before.shape[1:])
        if not before.numel():
            return
        self.spread.see(before if before.dim() else before.reshape(1))
        self.squared += squared_error(after, before)
        if self.part.kind == "classes":
            same = before.argmax(1) == after.argmax(1)
        elif self.part.kind == "answers":
            same = (self.part.logits(before) > 0) == (self.part.logits(after) > 0)
        else:
            return
        self.agreeing += int(same.sum())
        self.judged += same.numel()

    def record(self) -> OutputChange:
        error = self.spread.error(self.squared, self.elements)
        return OutputChange(
            path=self.part.path,
            shape=self.shape,
            mse=error.mse,
            relative_mse=error.relative_mse,
            agreement=self.agreeing / self.judged if self.judged else None,
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
