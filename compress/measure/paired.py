"""Two networks on the same images: paired statistics from their logits, and nothing else.

Everything is computed in float64. The comparison is paired: both networks saw the same images, so
what counts is on which images they differ, not two separate accuracies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from compress.errors import DataError, ModelError
from compress.result import CalibrationBin, ClassResult, EndMetric, Flip, Interval

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

CONFIDENCE_BINS = 15
_ROWS_AT_ONCE = 2048


def compare_logits(
    before: Tensor,
    after: Tensor,
    labels: Tensor | None = None,
    classes: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> EndMetric:
    """Compare a network before and after on the same images.

    A tie goes to the lower class index, in both networks and for every k, so that a network whose
    output is constant counts as always predicting one class.

    Args:
        before: Logits ``[images, classes]`` of the original.
        after: Logits of the same shape of the compressed network, rows in the same order.
        labels: Class indexes ``[images]``; without them only agreement, KL and confidences are
            known.
        classes: Class names by index; their indexes where None.
        names: What to call each image, such as its path.

    Raises:
        ModelError: The logits are not matrices of one shape, are empty, or are not finite.
        DataError: Labels, class names or image names do not fit the logits.
    """
    _check_shapes(before, after, labels, classes, names)
    titles = tuple(classes) if classes else tuple(str(i) for i in range(before.shape[1]))
    truth = None if labels is None else labels.detach().cpu().numpy().astype(np.int64)
    first, second = _reduce(before, after, truth)
    prediction, other = first.prediction, second.prediction
    unlabelled = EndMetric(
        images=len(prediction),
        classes=titles,
        mean_kl=float(second.divergence.mean()),
        agreement=float((prediction == other).mean()),
        confidence_before=float(first.confidence.mean()),
        confidence_after=float(second.confidence.mean()),
    )
    if truth is None:
        return unlabelled
    return _with_labels(unlabelled, first, second, truth, names)


class _Reduced:
    """What is kept of each row of logits: ``[images]`` each."""

    def __init__(self, images: int) -> None:
        self.prediction: Integers = np.zeros(images, dtype=np.int64)
        self.confidence: Floats = np.zeros(images)
        self.place: Integers = np.zeros(images, dtype=np.int64)
        self.divergence: Floats = np.zeros(images)


def _reduce(before: Tensor, after: Tensor, truth: Integers | None) -> tuple[_Reduced, _Reduced]:
    """Walk over the rows in blocks, so that a large test set needs no float64 copy of itself."""
    first, second = _Reduced(len(before)), _Reduced(len(before))
    for start in range(0, len(before), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        p = _finite(before[rows], "original", start)
        q = _finite(after[rows], "compressed network", start)
        log_p, log_q = _log_softmax(p), _log_softmax(q)
        for reduced, logits, logs in ((first, p, log_p), (second, q, log_q)):
            # Ranked as given: the softmax can round two near logits into one.
            reduced.prediction[rows] = logits.argmax(axis=1)
            reduced.confidence[rows] = np.exp(logs.max(axis=1))
            if truth is not None:
                reduced.place[rows] = _place(logits, truth[rows])
        divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
        # Rounding alone can take a divergence of zero below it.
        second.divergence[rows] = np.maximum(divergence, 0.0)
    return first, second


def _finite(logits: Tensor, whose: str, start: int) -> Floats:
    values: Floats = logits.detach().cpu().double().numpy()
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise ModelError(
            f"The {whose} returned NaN or infinite logits for image {start + int(bad.argmax())} "
            "of the set being compared; nothing can be said about its accuracy. Check the "
            "checkpoint, the normalisation (--mean, --std) and the precision."
        )
    return values


def _log_softmax(values: Floats) -> Floats:
    shifted = values - values.max(axis=1, keepdims=True)
    logs: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logs


def _place(logits: Floats, truth: Integers) -> Integers:
    """Return how many classes are placed before the label's, ties to the lower index."""
    own = logits[np.arange(len(truth)), truth][:, None]
    lower = np.arange(logits.shape[1])[None, :] < truth[:, None]
    places: Integers = ((logits > own) | ((logits == own) & lower)).sum(axis=1)
    return places


def _with_labels(
    metric: EndMetric,
    first: _Reduced,
    second: _Reduced,
    truth: Integers,
    names: Sequence[str] | None,
) -> EndMetric:
    images, count = metric.images, len(metric.classes)
    right, still = first.place == 0, second.place == 0
    lost, gained = right & ~still, ~right & still
    top5 = count > 5
    bins_before = _bins(first.confidence, right)
    bins_after = _bins(second.confidence, still)

    def flips(where: Booleans) -> tuple[Flip, ...]:
        return tuple(
            Flip(
                index=i,
                label=int(truth[i]),
                before=int(first.prediction[i]),
                after=int(second.prediction[i]),
                confidence_before=float(first.confidence[i]),
                confidence_after=float(second.confidence[i]),
                name=names[i] if names is not None else "",
            )
            for i in np.flatnonzero(where).tolist()
        )

    n_lost, n_gained = int(lost.sum()), int(gained.sum())
    low, high = paired_interval(n_lost, n_gained, images)
    return EndMetric(
        images=images,
        classes=metric.classes,
        top1_before=float(right.mean()),
        top1_after=float(still.mean()),
        top5_before=float((first.place < 5).mean()) if top5 else None,
        top5_after=float((second.place < 5).mean()) if top5 else None,
        drop=100.0 * (n_lost - n_gained) / images,
        drop_interval=Interval(100 * low, 100 * high, 0.95, "Tango score interval, paired"),
        mcnemar_p=mcnemar(n_lost, n_gained),
        mean_kl=metric.mean_kl,
        agreement=metric.agreement,
        to_wrong_count=n_lost,
        to_right_count=n_gained,
        other_flips=int((~right & ~still & (first.prediction != second.prediction)).sum()),
        to_wrong=flips(lost),
        to_right=flips(gained),
        per_class=_per_class(metric.classes, truth, right, still),
        ece_before=_ece(bins_before, images),
        ece_after=_ece(bins_after, images),
        confidence_before=metric.confidence_before,
        confidence_after=metric.confidence_after,
        bins_before=bins_before,
        bins_after=bins_after,
        near_chance=is_near_chance(float(right.mean()), count),
    )


def paired_interval(
    lost: int, gained: int, images: int, z: float = 1.959963984540054
) -> tuple[float, float]:
    """Return the score interval for a difference of paired proportions, as fractions.

    The interval holds every difference that the paired score test would not reject (Tango,
    "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17, 1998; among those that Fagerland, Lydersen
    and Laake recommend in Statistics in Medicine 33, 2014). It keeps its coverage for few
    differing images, and for none it is ``z² / (images + z²)`` either way, not a point.

    Args:
        lost: Images right before and wrong after.
        gained: Images wrong before and right after.
        images: All images.
        z: Normal quantile; the default is that of 95%.

    Returns:
        Ends of the interval on (lost - gained) / images.

    Raises:
        ValueError: The counts are negative, exceed the images, or there are no images.
    """
    if images < 1 or min(lost, gained) < 0 or lost + gained > images:
        raise ValueError(f"no table has {lost} lost and {gained} gained of {images} images")
    estimate = (lost - gained) / images
    # The score falls as the difference rises: it is z at the lower end and -z at the upper.
    low = _bisect(lambda delta: _score(delta, lost, gained, images) - z, -1.0, estimate)
    high = _bisect(lambda delta: _score(delta, lost, gained, images) + z, estimate, 1.0)
    return low, high


def _score(delta: float, lost: int, gained: int, images: int) -> float:
    """Tango's statistic, equation 3.3: the difference over its error where it truly is delta."""
    a = 2.0 * images
    b = (2.0 * images - lost + gained) * delta - lost - gained
    c = -gained * delta * (1.0 - delta)
    share = (math.sqrt(max(b * b - 4.0 * a * c, 0.0)) - b) / (2.0 * a)
    variance = images * (2.0 * share + delta * (1.0 - delta))
    distance = lost - gained - images * delta
    if variance <= 0.0:
        return 0.0 if distance == 0.0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _bisect(falling: Callable[[float], float], low: float, high: float) -> float:
    """Return where a falling function of a bounded interval changes sign, or its nearer end."""
    for _ in range(100):
        middle = 0.5 * (low + high)
        if falling(middle) > 0.0:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided exact p-value of McNemar's test.

    Under the hypothesis that both networks are equally accurate each flip is a fair coin; the
    value is twice the binomial tail, at most 1, computed in whole numbers (McNemar, Psychometrika
    12, 1947; the conditional exact form).
    """
    flips = lost + gained
    ways = tail = 1
    for k in range(1, min(lost, gained) + 1):
        ways = ways * (flips - k + 1) // k
        tail += ways
    return float(min(1.0, 2 * tail / 2**flips))


def is_near_chance(accuracy: float, classes: int) -> bool:
    """Whether an accuracy covers less than a tenth of the way from guessing to perfection.

    A trained network that scores so low is usually one whose classes are in another order or
    whose images are normalised wrongly.
    """
    chance = 1.0 / classes
    return classes > 1 and accuracy < chance + 0.1 * (1.0 - chance)


def _per_class(
    classes: tuple[str, ...], truth: Integers, right: Booleans, still: Booleans
) -> tuple[ClassResult, ...]:
    images = np.bincount(truth, minlength=len(classes))
    before = np.bincount(truth[right], minlength=len(classes))
    after = np.bincount(truth[still], minlength=len(classes))
    return tuple(
        ClassResult(name, int(n), b / n, a / n, 100.0 * (a - b) / n) if n else ClassResult(name, 0)
        for name, n, b, a in zip(
            classes, images.tolist(), before.tolist(), after.tolist(), strict=True
        )
    )


def _bins(confidence: Floats, right: Booleans) -> tuple[CalibrationBin, ...]:
    """Sort images into bins of equal width, closed above as in Guo et al. 2017."""
    place = np.clip(np.ceil(confidence * CONFIDENCE_BINS) - 1, 0, CONFIDENCE_BINS - 1)
    bins = []
    for i in range(CONFIDENCE_BINS):
        here = place == i
        n = int(here.sum())
        bins.append(
            CalibrationBin(n, float(confidence[here].mean()), float(right[here].mean()))
            if n
            else CalibrationBin(0)
        )
    return tuple(bins)


def _ece(bins: tuple[CalibrationBin, ...], images: int) -> float:
    """Expected calibration error (Guo et al., "On Calibration of Modern Neural Networks", 2017)."""
    gaps = [
        b.images * abs(b.accuracy - b.confidence)
        for b in bins
        if b.accuracy is not None and b.confidence is not None
    ]
    return math.fsum(gaps) / images


def _check_shapes(
    before: Tensor,
    after: Tensor,
    labels: Tensor | None,
    classes: Sequence[str] | None,
    names: Sequence[str] | None,
) -> None:
    if before.ndim != 2 or 0 in before.shape or before.shape != after.shape:
        raise ModelError(
            "Logits of one shape [images, classes], with at least one image, are needed to compare "
            f"two networks; the original returned {list(before.shape)} and the compressed "
            f"network {list(after.shape)}. For a network that is not a classifier pass --metric-fn."
        )
    images, count = before.shape
    if classes is not None and len(classes) != count:
        raise DataError(
            f"The data has {len(classes)} classes ({_some(classes)}) and the model's output has "
            f"{count}. Build the model with that number of classes (--model 'SPEC?num_classes="
            f"{len(classes)}'), or map the data's classes to the model's with --class-map."
        )
    if names is not None and len(names) != images:
        raise DataError(f"There are {len(names)} image names for {images} images.")
    if labels is None:
        return
    if labels.shape != (images,):
        raise DataError(f"The labels have shape {list(labels.shape)} for {images} images.")
    if labels.is_floating_point() or labels.is_complex():
        raise DataError(f"The labels are of type {labels.dtype}; class indexes are whole numbers.")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= count:
        wrong = lowest if lowest < 0 else highest
        raise DataError(
            f"The label {wrong} is outside 0 to {count - 1}, the classes of the model's output. "
            "Check that the data belongs to this model, or map its classes with --class-map."
        )


def _some(classes: Sequence[str]) -> str:
    return ", ".join(classes[:5]) + (", …" if len(classes) > 5 else "")
