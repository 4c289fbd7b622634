"""Segmentation: a class for every pixel, judged by the mean intersection over union."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import DataError
from compress.running.outputs import Part, are_probabilities
from compress.tasks.record import Measure, Scorer, Setup, Task, require_torchmetrics

# Of two classes one output is enough: yes or no.
_MODES = {4: "bilinear", 5: "trilinear", 3: "linear"}


class _Scorer(Scorer):
    """Of every image and class: pixels that are of it, that are predicted so, and both."""

    def __init__(self, setup: Setup) -> None:
        self.package = require_torchmetrics(SEGMENTATION.name)
        self.setup = setup
        self.rows: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        self.metric: Any = None
        self.binary = False

    def add(self, result: Any, targets: Any) -> None:
        scores = self.setup.output(result)
        masks = _as_masks(targets, scores)
        self.binary, ignored = scores.shape[1] == 1, self.setup.ignore_index
        classes = max(scores.shape[1], 2)
        judged = masks != ignored
        wrong = masks[judged & ((masks < 0) | (masks >= classes))]
        if wrong.numel():
            raise SEGMENTATION.misfit(
                f"a mask holds {int(wrong[0])}, while the network knows the classes 0 to "
                f"{classes - 1}: pass --ignore-index {int(wrong[0])} for pixels that are not to be "
                "judged"
            )
        found = predicted(scores, self.setup.part, masks.shape[1:])
        if self.metric is None:
            self.metric = self.package.classification.MulticlassJaccardIndex(
                classes, ignore_index=ignored, validate_args=False
            )
        self.metric.update(found, masks)
        self.rows[0].append(_counted(masks, judged, classes))
        self.rows[1].append(_counted(found, judged, classes))
        self.rows[2].append(_counted(found, judged & (found == masks), classes))

    @property
    def width(self) -> int:
        return 3 * self.rows[0][0].shape[1]

    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return true, predicted and right pixels ``[images, classes]``, as float64."""
        true, found, right = (torch.cat(rows).double() for rows in self.rows)
        ignored = self.setup.ignore_index
        if 0 <= ignored < true.shape[1]:  # a class that is not to be judged has no share
            for sums in (true, found, right):
                sums[:, ignored] = 0
        return true, found, right

    def values(self) -> tuple[float | None, ...]:
        true, _, right = self._sums()
        if not float(true.sum()):
            raise DataError("No pixel of the masks is to be judged, so there is no mIoU.")
        if self.binary and not float(true[:, 1].sum()):
            raise DataError(
                "No mask holds the class 1, so there is no mIoU of a network with one output: "
                "masks of 0 and 255 have to be given as 0 and 1."
            )
        return float(self.metric.compute()), float(right.sum() / true.sum())

    def each(self) -> Tensor:
        return _mean_iou(*self._sums())

    def resampled(self, counts: Tensor) -> Tensor:
        true, found, right = self._sums()
        return _mean_iou(counts @ true, counts @ found, counts @ right)

    def by_class(self) -> tuple[tuple[int, float | None], ...]:
        true, found, right = self._sums()
        union = (true + found - right).sum(0)
        shares = right.sum(0) / union
        images = (true > 0).sum(0)
        return tuple(
            (int(n), float(share) if whole else None)
            for n, share, whole in zip(images, shares, union, strict=True)
        )


def _mean_iou(true: Tensor, found: Tensor, right: Tensor) -> Tensor:
    """Return the mean over the classes that occur or are predicted, ``[...]``; NaN for none."""
    union = true + found - right
    return (right / union.where(union > 0, torch.nan)).nanmean(-1)


def _counted(classes: Tensor, where: Tensor, number: int) -> Tensor:
    """Return how many pixels of each image are of each class, ``[images, number]``."""
    images = len(classes)
    first = torch.arange(images).mul(number).reshape(-1, *[1] * (classes.dim() - 1))
    return torch.bincount((first + classes)[where], minlength=images * number).view(images, number)


def predicted(scores: Tensor, part: Part | None, size: torch.Size) -> Tensor:
    """Return the class of every pixel ``[B, ...]``, scores of a smaller size enlarged."""
    if scores.shape[2:] != size:
        scores = F.interpolate(scores, tuple(size), mode=_MODES[scores.dim()], align_corners=False)
    if scores.shape[1] > 1:
        return scores.argmax(1)
    return (scores[:, 0] > (0.5 if part is not None and part.normalised else 0.0)).long()


def _as_masks(targets: Any, scores: Tensor) -> Tensor:
    """Return the class numbers ``[B, ...]`` of a batch.

    Raises:
        DataError: They are none, or do not fit the scores.
    """
    if not isinstance(targets, Tensor):
        raise SEGMENTATION.misfit(f"a batch has {type(targets).__name__} in their place")
    masks = without_channel(targets, scores.dim() - 1)
    if masks.dim() != scores.dim() - 1 or len(masks) != len(scores) or _larger(scores, masks):
        raise SEGMENTATION.misfit(
            f"a batch has targets {list(targets.shape)} beside outputs {list(scores.shape)}"
        )
    if masks.is_floating_point() and not bool((masks == masks.round()).all()):
        raise SEGMENTATION.misfit("these masks hold fractions")
    return masks.long()


def _larger(scores: Tensor, masks: Tensor) -> bool:
    return any(a > b for a, b in zip(scores.shape[2:], masks.shape[1:], strict=True))


def without_channel(masks: Tensor, axes: int) -> Tensor:
    """Return masks ``[B, 1, ...]`` without the axis that says nothing."""
    return masks.squeeze(1) if masks.dim() == axes + 1 and masks.shape[1] == 1 else masks


def _accepts(target: Any) -> bool:
    return isinstance(target, Tensor) and target.dim() >= 2 and not target.is_complex()


def _fits(output: Tensor, target: Any) -> bool:
    if output.dim() not in _MODES or target is None:
        return output.dim() in (4, 5)
    mask = without_channel(target.unsqueeze(0), output.dim() - 1)
    return mask.dim() == output.dim() - 1 and not _larger(output, mask)


def _read(path: str, output: Tensor, *, sigmoid: bool) -> Part:
    if output.shape[1] > 1:
        return Part(path, "classes", are_probabilities(output))
    return Part(path, "answers", sigmoid or bool(((output >= 0) & (output <= 1)).all()))


SEGMENTATION = Task(
    name="segmentation",
    measures=(Measure("mIoU", "fraction"), Measure("Pixel accuracy", "fraction")),
    targets="a mask [H, W] of class numbers for each image",
    accepts=_accepts,
    looks_for="an output [batch, classes, H, W] that is not larger than the mask",
    fits=_fits,
    read=_read,
    scorer=_Scorer,
)
