"""Judging many networks on the same images: decoded once, the original's logits computed once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from compress.config import RunConfig
from compress.data import Batches, ImageSet, batches
from compress.inputs.functions import metric_function
from compress.measure.accuracy import all_logits, compare
from compress.progress import Track
from compress.result import EndMetric

# Sets whose decoded images take more than this are decoded again for every point.
HELD_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class HeldImages(ImageSet):
    """A set whose inputs are in memory, ``[N, ...]``; otherwise the set it was made from."""

    inputs: Tensor | None = None

    def stack(self, positions: range | list[int]) -> Tensor:  # type: ignore[override]
        """Return the inputs at some positions as one tensor."""
        assert self.inputs is not None
        if isinstance(positions, range) and positions.step == 1:
            return self.inputs[positions.start : positions.stop]
        return self.inputs[torch.as_tensor(list(positions))]


def hold(images: ImageSet, batch_size: int, workers: int, cap: int = HELD_BYTES) -> ImageSet:
    """Return the set with its decoded inputs in memory, or as it is where they exceed ``cap``."""
    first = images[0][0]
    if first.numel() * first.element_size() * len(images) > cap:
        return images
    inputs = torch.cat([stacked for stacked, _ in batches(images, batch_size, workers)])
    return HeldImages(
        images.source,
        images.preprocessing,
        images.indices,
        images.class_names,
        images.label_order,
        inputs,
    )


class Judge:
    """Compares networks with one original on one set of images.

    Args:
        original: The original.
        images: The set.
        config: Workers and the user's own metric.
        batch_size: Images a batch.
        describe: What the images are, for progress.
        track: Progress.
    """

    def __init__(
        self,
        original: nn.Module,
        images: ImageSet,
        config: RunConfig,
        batch_size: int,
        describe: str,
        track: Track,
    ) -> None:
        self.original, self.given, self.config = original, images, config
        self.batch_size, self.describe, self.track = batch_size, describe, track
        self.metric = metric_function(config)
        self._own_value: float | None = None

    @cached_property
    def images(self) -> ImageSet:
        """The images, held where memory allows it."""
        return hold(self.given, self.batch_size, self.config.workers)

    @cached_property
    def logits(self) -> Tensor | None:
        """The original's logits; None where the user's own metric is measured instead."""
        if self.metric is not None:
            return None
        loaded = batches(self.images, self.batch_size, self._workers)
        return all_logits(self.original, loaded, f"{self.describe}: original", self.track)

    @property
    def _workers(self) -> int:
        return 0 if isinstance(self.images, HeldImages) else self.config.workers

    def __call__(self, model: nn.Module) -> EndMetric:
        """Compare a network with the original; the lists of flipped images are left out."""
        metric = compare(
            self.original,
            model,
            self.images,
            self.config.replace(workers=self._workers),
            batch_size=self.batch_size,
            metric=None if self.metric is None else self._measure,
            describe=self.describe,
            before_logits=self.logits,
            track=self.track,
        )
        return brief(metric)

    def _measure(self, model: nn.Module, loaded: Batches) -> float:
        """The user's metric, measured once for the original."""
        assert self.metric is not None
        if model is not self.original:
            return float(self.metric(model, loaded))
        if self._own_value is None:
            self._own_value = float(self.metric(model, loaded))
        return self._own_value


def brief(metric: EndMetric) -> EndMetric:
    """Leave out the lists of images that flipped, of which a point's report shows the counts."""
    return replace(metric, to_wrong=(), to_right=())
