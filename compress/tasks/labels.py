"""Several yes-or-no labels for each image, judged by the mean average precision over the labels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compress.errors import DataError
from compress.libraries.record import quiet
from compress.running.outputs import Part
from compress.tasks.record import Measure, Scorer, Setup, Task, require_torchmetrics


class _Scorer(Scorer):
    """Scores and labels of all images: how precise a label is depends on their order."""

    def __init__(self, setup: Setup) -> None:
        self.package = require_torchmetrics(MULTILABEL.name)
        self.setup = setup
        self.rows: tuple[list[Tensor], list[Tensor]] = ([], [])

    def add(self, result: Any, targets: Any) -> None:
        output = self.setup.output(result)
        if isinstance(targets, Tensor) and targets.dim() == 1 and output.shape[1:] == (1,):
            targets = targets.unsqueeze(1)  # one label, given as a number
        if not isinstance(targets, Tensor) or targets.shape != output.shape:
            shape = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise MULTILABEL.misfit(
                f"a batch has targets {shape} beside outputs {list(output.shape)}"
            )
        ignored = targets == self.setup.ignore_index
        if not bool(((targets == 0) | (targets == 1) | ignored).all()):
            raise MULTILABEL.misfit(
                f"they hold other numbers than 0, 1 and {self.setup.ignore_index} (--ignore-index)"
            )
        normalised = self.setup.part is not None and self.setup.part.normalised
        scores = output.double()
        # In float64, so that confident answers keep their order.
        self.rows[0].append(scores if normalised else scores.sigmoid())
        self.rows[1].append(targets.long())

    @property
    def width(self) -> int:
        return 8 * self.rows[0][0].shape[1]  # sorted, summed and divided

    def values(self) -> tuple[float | None, ...]:
        scores, labels = torch.cat(self.rows[0]), torch.cat(self.rows[1])
        metric = self.package.classification.MultilabelAveragePrecision(
            scores.shape[1],
            average="none",
            ignore_index=self.setup.ignore_index,
            validate_args=False,
        )
        with quiet():  # of labels that no image has, to which it gives nothing, and counts that
            shares = metric(scores, labels).reshape(-1)  # one label's is a number
        known = (labels == 1).any(0)
        if not bool(known.any()):
            raise DataError("No image has any of the labels, so --task multilabel has no measure.")
        return (float(shares[known].double().mean()),)

    def resampled(self, counts: Tensor) -> Tensor:
        return self._of_labels(counts).nanmean(1)

    def by_class(self) -> tuple[tuple[int, float | None], ...]:
        labels = torch.cat(self.rows[1])
        found = self._of_labels(torch.ones(1, len(labels), dtype=torch.float64))[0].tolist()
        images = (labels == 1).sum(0).tolist()
        return tuple((n, None if math.isnan(v) else v) for n, v in zip(images, found, strict=True))

    def _of_labels(self, counts: Tensor) -> Tensor:
        """Return the average precision of every label, ``[sets, labels]``; NaN for none."""
        scores, labels = torch.cat(self.rows[0]), torch.cat(self.rows[1])
        known = (labels != self.setup.ignore_index).double()
        columns = range(scores.shape[1])
        return torch.stack(
            [average_precision(scores[:, k], labels[:, k] == 1, counts * known[:, k])
             for k in columns], 1,
        )  # fmt: skip


def average_precision(scores: Tensor, positive: Tensor, counts: Tensor) -> Tensor:
    """Return the area under the steps of precision over recall.

    Args:
        scores: ``[images]``; images of one score are taken together.
        positive: ``[images]``, which of them have the label.
        counts: ``[sets, images]``, how often each counts.

    Returns:
        ``[sets]``; NaN where no image has the label.
    """
    order = scores.argsort(descending=True)
    ordered, counts = scores[order], counts[:, order]
    last = torch.ones(len(scores), dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    hits = (counts * positive[order]).cumsum(1)[:, last]
    seen = counts.cumsum(1)[:, last]
    gained = hits.diff(dim=1, prepend=torch.zeros(len(counts), 1, dtype=hits.dtype))
    return (gained * hits / seen.clamp_min(1)).sum(1) / hits[:, -1]


def _accepts(target: Any) -> bool:
    if isinstance(target, Tensor):
        return target.dim() == 1
    return isinstance(target, int | float) and target in (0, 1)


def _fits(output: Tensor, target: Any) -> bool:
    labels = len(target) if isinstance(target, Tensor) else 1
    return output.dim() == 2 and (target is None or output.shape[1] == labels)


def _read(path: str, output: Tensor, *, sigmoid: bool) -> Part:
    return Part(path, "answers", sigmoid or bool(((output >= 0) & (output <= 1)).all()))


MULTILABEL = Task(
    name="multilabel",
    measures=(Measure("mAP", "fraction"),),
    targets="a tensor [labels] of zeros and ones for each image, or one such number",
    accepts=_accepts,
    looks_for="an output [batch, labels]",
    fits=_fits,
    read=_read,
    scorer=_Scorer,
)
