"""Batches to learn from, with what the original makes of them.

Where images are seen several times, the same batches come again in another order, so that what the
original returns for them is computed once and kept; what it computes on the way is too much for
that. Everything follows from the seed and the number
of a step: a course that goes on where it was stopped sees what it would have seen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.data import ImageSet, Loader, draw
from compress.data.datasets import DatasetSource
from compress.data.loading import seed_of
from compress.data.workers import batches_from_workers
from compress.errors import DataError
from compress.recover.distance import Distance
from compress.recover.features import Features, Seen
from compress.running.forward import evaluation_mode, run_model
from compress.running.precision import in_mixed_precision
from compress.running.structure import checksum, mapped, placed, tensors
from compress.running.structure import size as bytes_of
from compress.vision.augment import augmented

# The original's results that are kept may take so many bytes.
KEPT_BYTES = 1 << 28
# How often a batch is seen before others are drawn: the original then takes a quarter of the time
# that it would take otherwise, and four times are too few to learn by heart.
REPEATS = 4


def repeats(features: Features) -> int:
    """How often a batch is seen, where nothing but what the original returns has to be kept."""
    return 1 if features.weights else REPEATS


def come_again(images: ImageSet) -> bool:
    """Whether images are the same each time; a data set of the user's may change them by itself."""
    return images.held or not isinstance(images.source, DatasetSource)


@dataclass(frozen=True)
class Division:
    """Disjoint images to learn from and to judge by."""

    learning: ImageSet
    held_out: ImageSet


def divided(images: ImageSet, fitted: int, seed: int) -> Division:
    """Divide images into those to learn from and those held out.

    The images that validated the compression are the first to be held out, and those that it was
    fitted to are always learnt from; see `compress.data.loading.draw`.

    Args:
        images: All images there are.
        fitted: How many images the compression drew.
        seed: Its seed.

    Raises:
        DataError: There are fewer than two.
    """
    total = len(images)
    if total < 2:
        raise DataError(
            f"{images.source.described} holds {total} image{'' if total == 1 else 's'}: recovery "
            "takes at least two, one to learn from and one held out; some hundred are few."
        )
    drawn = draw(total, fitted, seed)
    learning, held_out = drawn.fit + drawn.further, drawn.validation + drawn.held_out
    return Division(images.subset(learning), images.subset(held_out))


@dataclass(frozen=True)
class Right:
    """What the original makes of a batch.

    Attributes:
        outputs: What `Distance.taught` keeps of its result.
        features: What it computes on the way, by place.
    """

    outputs: Any
    features: Seen = field(default_factory=dict)


@dataclass
class Lessons:
    """Batches to learn from.

    Attributes:
        images: What to learn from.
        loader: How they reach a network; ``batch_size`` is that of a step.
        original: What says what is right, on the loader's device and in its memory format.
        distance: What is kept of its results.
        augmentation: A kind of `compress.vision.augment`.
        seed: Decides order and changes.
        steps: How many batches there will be, which decides how often each is seen.
        mixed: Whether the original computes in mixed precision.
        features: What it is asked for beside its outputs.
        seconds: What reading images and the original took, filled in.
    """

    images: ImageSet
    loader: Loader
    original: nn.Module
    distance: Distance
    augmentation: str
    seed: int
    steps: int
    mixed: bool = False
    features: Features = field(default_factory=Features)
    seconds: dict[str, float] = field(default_factory=lambda: {"images": 0.0, "original": 0.0})
    _kept: dict[tuple[int, int], tuple[int, Right]] = field(default_factory=dict)
    _bytes: int = 0
    _orders: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        """Images of a batch."""
        return min(self.loader.batch_size, len(self.images))

    @property
    def batches(self) -> int:
        """How many batches all images make; a last one that is not full is left out."""
        return len(self.images) // self.batch_size

    @property
    def sets(self) -> int:
        """How many sets of batches there are, each of all images in an order of its own."""
        passes = -(-self.steps // self.batches)
        return max(1, -(-passes // repeats(self.features)))

    def begin(self, step: int) -> Iterator[tuple[Any, Right]]:
        """Yield the inputs of each step from one on, placed, and what the original makes of them.

        Raises:
            DataError: An image cannot be read.
            ModelError: The original's forward fails.
        """
        keys = [self._key(number) for number in range(step, self.steps)]
        read = self._read(keys)
        for key in keys:
            begun = time.perf_counter()
            given = augmented(next(read), self.augmentation, self._seed("picture", *key))
            inputs = placed(given, self.loader.device, self.loader.memory_format)
            seen = time.perf_counter()
            taught = self._taught(key, inputs, given)
            self.seconds["images"] += seen - begun
            self.seconds["original"] += time.perf_counter() - seen
            yield inputs, taught

    def _read(self, keys: list[tuple[int, int]]) -> Iterator[Any]:
        chunks = map(self._positions, keys)
        if not self.loader.workers or self.images.held:
            for chunk in chunks:
                yield self.images.batch(chunk)[0]
            return
        for batch in batches_from_workers(self.images, list(chunks), self.loader.workers):
            if isinstance(batch, DataError):
                raise batch
            yield batch[0]

    def _key(self, step: int) -> tuple[int, int]:
        """The set of a step's batch, and its number in that."""
        turn, index = divmod(step, self.batches)
        return turn % self.sets, self._order(self.batches, "turn", turn)[index]

    def _positions(self, key: tuple[int, int]) -> list[int]:
        drawn, number = key
        order = self._order(len(self.images), "set", drawn)
        return order[number * self.batch_size : (number + 1) * self.batch_size]

    def _taught(self, key: tuple[int, int], inputs: Any, given: Any) -> Right:
        again = self.sets * self.batches < self.steps
        same = checksum(given) if again and not come_again(self.images) else 0
        if key in self._kept and self._kept[key][0] == same:
            return self._kept[key][1]
        with self.features.seen(self.original) as features:
            outputs = taught(self.original, inputs, self.distance, mixed=self.mixed)
        found = Right(outputs, features)
        size = bytes_of(outputs)
        if again and not features and key not in self._kept and self._bytes + size <= KEPT_BYTES:
            self._kept[key] = same, found
            self._bytes += size
        return found

    def _order(self, count: int, what: str, number: int) -> list[int]:
        """An order of things; the last one of each kind is kept, since the next step asks again."""
        last, order = self._orders.get(what, (-1, []))
        if last != number:
            generator = torch.Generator().manual_seed(self._seed(what, number))
            order = torch.randperm(count, generator=generator).tolist()
            self._orders[what] = number, order
        return order

    def _seed(self, *of: Any) -> int:
        return seed_of(self.seed, self.augmentation, *of)


def taught(original: nn.Module, inputs: Any, distance: Distance, *, mixed: bool = False) -> Any:
    """Return what has to be kept of what the original returns for a batch.

    Args:
        original: It, on the device of its inputs.
        inputs: The batch.
        distance: What is kept.
        mixed: Whether it computes in mixed precision.

    Raises:
        ModelError: Its forward fails.
    """
    device = next(iter(tensors(inputs).values())).device
    forward = in_mixed_precision(run_model, device) if mixed else run_model
    with torch.no_grad(), evaluation_mode(original):
        result = forward(original, inputs)
    return mapped(distance.taught(result), _by_itself)


def _by_itself(tensor: Tensor) -> Tensor:
    """A tensor that keeps no more alive than its own numbers, as a view of a larger one does."""
    own = tensor.detach()
    return own.clone() if own.untyped_storage().nbytes() > own.numel() * own.element_size() else own
