"""What networks return for the same images, and how far it is apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.data import Batches
from compress.errors import ModelError
from compress.measure.spread import Spread, squared_error
from compress.progress import Track, silent
from compress.result import EndMetric, OutputChange
from compress.running.finite import check_finite
from compress.running.forward import evaluation_mode, run_model
from compress.running.outputs import Part, Reading, read_outputs
from compress.running.structure import count, floating, like_weights, mapped


def results(
    model: nn.Module, inputs: Batches, describe: str, track: Track = silent
) -> Iterator[Any]:
    """Yield what a model returns for each batch, on the CPU, real numbers in float32.

    Raises:
        ModelError: The forward fails, or gives NaN or infinite values.
    """
    seen = 0
    for given, _ in track(inputs, describe, len(inputs)):
        yield result_of(model, given, f"on the images from number {seen} ({describe})")
        seen += count(given)


def result_of(model: nn.Module, given: Any, where: str) -> Any:
    """Return what a model returns for a batch, on the CPU, real numbers in float32.

    Raises:
        ModelError: The forward fails, or gives NaN or infinite values.
    """
    images = like_weights(given, next(model.parameters()))
    with torch.inference_mode(), evaluation_mode(model):
        result = run_model(model, images)
    check_finite(
        model, images, result, where,
        "check these images, the checkpoint and the normalisation (--mean, --std)",
    )  # fmt: skip
    return mapped(result, lambda t: (t.float() if t.is_floating_point() else t).cpu())


@dataclass
class Comparison:
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
            self.add(before, after)

    def add(self, before: Any, after: Any) -> None:
        """Compare a batch; errors as `add_all`."""
        self.reading = self.reading or read_outputs(before)
        if not self.beside:
            self._judge(self.reading, before, after)
        self._compare(self.reading, floating(before), floating(after))

    def _judge(self, reading: Reading, before: Any, after: Any) -> None:
        if not reading.parts:  # all of the result counts, as of a detector
            self.images += count(before)
            return
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
