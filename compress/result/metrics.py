"""The network before and after on the same images, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flip:
    """An image whose verdict changed: predictions as class indexes, confidences in them."""

    index: int
    label: int
    before: int
    after: int
    confidence_before: float
    confidence_after: float
    name: str = ""


@dataclass(frozen=True)
class ClassResult:
    """Accuracy, or a task's measure, on one class; None where it has no image in the set."""

    name: str
    images: int
    before: float | None = None
    after: float | None = None
    change: float | None = None


@dataclass(frozen=True)
class CalibrationBin:
    """One bin of confidences: how many images, how confident, how often right."""

    images: int
    confidence: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Interval:
    """A confidence interval, in points."""

    low: float
    high: float
    level: float = 0.95
    method: str = ""


@dataclass(frozen=True)
class CustomMetric:
    """What a measure other than accuracy came to, before and after.

    Attributes:
        name: Of the user's own function, or of the task's measure.
        before: Of the original.
        after: Of the compressed network.
        unit: ``"fraction"``, shown as percent with changes in points; ``"dB"``; or empty.
        lower_is_better: Whether a smaller value is the better one.
    """

    name: str
    before: float
    after: float
    unit: str = ""
    lower_is_better: bool = False


@dataclass(frozen=True)
class Example:
    """An image that a report shows before and after, with its own measure."""

    index: int
    before: float
    after: float
    name: str = ""


@dataclass(frozen=True)
class OutputChange:
    """How one floating output of the network changed.

    Attributes:
        path: Where it lies in what the forward returns, such as ``out.aux``; empty where it is all.
        shape: Of one image.
        mse: Mean squared difference.
        relative_mse: The same over the mean variance of the original's channels; None where that
            is zero.
        agreement: Share of positions with the same class, or of answers with the same side; None
            for values.
    """

    path: str
    shape: tuple[int, ...]
    mse: float
    relative_mse: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class EndMetric:
    """The network before and after on the same images, as `compare_logits` finds it.

    Attributes:
        images: Number of images compared.
        classes: Class names by index.
        top5_before: None where there are five classes or fewer; so ``top5_after``.
        drop: Loss of top-1 accuracy in points, with its paired interval; of another measure in
            points of a fraction, else in its own unit.
        mcnemar_p: Two-sided exact p-value of McNemar's test that both are equally accurate.
        mean_kl: Mean KL(before || after) in nats.
        agreement: Share of images on which both predict the same class.
        to_wrong: Images right before and wrong after; ``to_right`` the other way round.
        other_flips: How many moved from one wrong class to another.
        per_class: Rows in class order.
        ece_before: Expected calibration error over ``bins_before``.
        near_chance: The baseline is hardly better than guessing: class order or normalisation.
        task: The task that the measure is of; empty for accuracy or a measure of the user's own.
        custom: What the task's measure or the user's own gave; figures of accuracy are then None.
        further: Other measures of the task, which decide nothing.
        examples: Images that stand for the set, greatest loss first.
        outputs: How each floating output changed.
    """

    images: int
    classes: tuple[str, ...] = ()
    top1_before: float | None = None
    top1_after: float | None = None
    top5_before: float | None = None
    top5_after: float | None = None
    drop: float | None = None
    drop_interval: Interval | None = None
    mcnemar_p: float | None = None
    mean_kl: float | None = None
    agreement: float | None = None
    to_wrong_count: int | None = None
    to_right_count: int | None = None
    other_flips: int | None = None
    to_wrong: tuple[Flip, ...] = ()
    to_right: tuple[Flip, ...] = ()
    per_class: tuple[ClassResult, ...] = ()
    ece_before: float | None = None
    ece_after: float | None = None
    confidence_before: float | None = None
    confidence_after: float | None = None
    bins_before: tuple[CalibrationBin, ...] = ()
    bins_after: tuple[CalibrationBin, ...] = ()
    near_chance: bool = False
    task: str = ""
    custom: CustomMetric | None = None
    further: tuple[CustomMetric, ...] = ()
    examples: tuple[Example, ...] = ()
    outputs: tuple[OutputChange, ...] = ()
