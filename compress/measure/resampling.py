"""How far a change could be chance: both networks on the same images, drawn again and again.

A mean over images, a ratio of sums and an average precision all have an interval by the paired
bootstrap (Efron & Tibshirani 1993): the images are drawn with replacement, the measures of both
networks are taken of the same draw, and the interval holds the middle 95% of their differences.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compress.result import Interval
from compress.tasks import Measure, Scorer

# Of fewer images, draws are too much alike for an interval to hold what it promises.
FEWEST_IMAGES = 10
_MOST, _LEAST = 2000, 200
# Numbers that are added in all, and that draws hold at a time.
_WORK, _HELD = 2e8, 4e6
_LEVEL = 0.95


def paired_bootstrap(
    measure: Measure, before: Scorer, after: Scorer, images: int, seed: int = 0
) -> Interval | None:
    """Return the interval of a measure's drop, in its units.

    Args:
        measure: The measure.
        before: The original's results.
        after: The compressed network's, on the same images.
        images: How many there are.
        seed: Of the draws.

    Returns:
        The interval; None where there are too few images, or the measure does not follow from
        what the images add.
    """
    if images < FEWEST_IMAGES:
        return None
    number = int(min(_MOST, max(_LEAST, _WORK // (images * before.width))))
    drops = []
    for counts in _draws(number, images, seed):
        first, second = before.resampled(counts), after.resampled(counts)
        if first is None or second is None:
            return None
        drops.append(measure.drop(first, second))
    found = torch.cat(drops)
    known = found[found.isfinite()]
    if len(known) < _LEAST // 2:
        return None
    ends = known.quantile(torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=known.dtype))
    low, high = (float(end) for end in ends)
    method = f"paired bootstrap over the images, {number:,} draws, percentiles"
    return Interval(low, high, _LEVEL, method)


def _draws(number: int, images: int, seed: int) -> Iterator[Tensor]:
    """Yield how often each image is drawn, ``[sets, images]``, in all ``number`` sets."""
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, int(_HELD // images))
    for start in range(0, number, at_once):
        sets = min(at_once, number - start)
        drawn = torch.randint(0, images, (sets, images), generator=generator)
        counts = torch.zeros(sets, images, dtype=torch.float64)
        yield counts.scatter_add_(1, drawn, torch.ones(sets, images, dtype=torch.float64))
