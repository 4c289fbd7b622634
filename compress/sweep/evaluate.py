"""Judging many networks on the same images: decoded once, the original run once."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn

from compress.data import Batches, ImageSet
from compress.inputs.functions import Metric
from compress.measure.accuracy import Yardstick
from compress.result import EndMetric


class Judge:
    """Compares networks with one original on one set of images.

    Args:
        original: The original.
        images: The set, held where memory allows it.
        yardstick: What networks are compared by.
        describe: What the images are, for progress.
    """

    def __init__(
        self, original: nn.Module, images: ImageSet, yardstick: Yardstick, describe: str
    ) -> None:
        self.original, self.images, self.describe = original, images, describe
        self.yardstick = yardstick
        if isinstance(yardstick.metric, Metric):
            measure = self._measured_once(yardstick.metric)
            self.yardstick = replace(yardstick, metric=measure)

    @cached_property
    def known(self) -> list[Any] | None:
        """What the original returns; None for too much, or the user's own metric instead."""
        if isinstance(self.yardstick.metric, Metric):
            return None
        describe = f"{self.describe}: original"
        return self.yardstick.known(self.original, self.images, describe)

    def __call__(self, model: nn.Module) -> EndMetric:
        """Compare a network with the original; the lists of flipped images are left out."""
        return brief(
            self.yardstick.compare(self.original, model, self.images, self.describe, self.known)
        )

    def _measured_once(self, metric: Metric) -> Metric:
        """The user's metric, measured once for the original."""
        known: list[float] = []

        def measure(model: nn.Module, loaded: Batches) -> float:
            if model is not self.original:
                return float(metric.function(model, loaded))
            if not known:
                known.append(float(metric.function(model, loaded)))
            return known[0]

        return Metric(metric.name, measure)


def brief(metric: EndMetric) -> EndMetric:
    """Leave out the images that a run's report shows; of flips a point's shows the counts."""
    return replace(metric, to_wrong=(), to_right=(), examples=())
