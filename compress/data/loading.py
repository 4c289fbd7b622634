"""Drawing images to fit and validate on, and handing them out in batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from compress.data.images import ImageSet
from compress.data.targets import collated
from compress.data.workers import batches_from_workers
from compress.errors import DataError
from compress.running.structure import concatenated, mapped, placed, shapes

# How many images a recovery judges itself by, at most and of all; those that validated are the
# first of them.
MOST_HELD_OUT = 1000
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class Split:
    """Disjoint images, with the plain record of how they were drawn.

    Attributes:
        fit: To fit to.
        validation: To validate on.
        record: How they were drawn.
        further: What else may be learnt from, in the order in which it should be; None if nothing.
    """

    fit: ImageSet
    validation: ImageSet
    record: dict[str, Any]
    further: ImageSet | None = None


def split(images: ImageSet, count: int, seed: int, validation_fraction: float = 0.25) -> Split:
    """Draw images without replacement and part them.

    Args:
        images: The set to draw from.
        count: How many images to draw in all, at most.
        seed: Decides the draw; the global random state is neither used nor changed.
        validation_fraction: The part that validates, at least one image where two are drawn.

    Raises:
        DataError: The set is empty.
    """
    if min(count, len(images)) < 1:
        raise DataError(f"{images.source.described} holds no images to calibrate on.")
    found = draw(len(images), count, seed, validation_fraction)
    fit, validation = found.fit, found.validation
    drawn = hashlib.sha256(json.dumps([fit, validation]).encode()).hexdigest()
    record = {
        "seed": seed,
        "images": len(images),
        "fit": len(fit),
        "validation": len(validation),
        "validation_fraction": validation_fraction,
        "indices_sha256": drawn,
    }
    return Split(
        fit=images.subset(fit),
        validation=images.subset(validation),
        record=record,
        further=images.subset(found.further),
    )


@dataclass(frozen=True)
class Drawn:
    """Positions of images, each in one of these.

    Attributes:
        fit: To fit to.
        validation: To validate on.
        further: What else may be learnt from.
        held_out: What nothing but a recovery looks at, to judge itself by.
    """

    fit: list[int]
    validation: list[int]
    further: list[int]
    held_out: list[int]


def draw(images: int, count: int, seed: int, validation_fraction: float = 0.25) -> Drawn:
    """Draw positions to fit and to validate on, as `split` does, and divide those that are left."""
    total = min(count, images)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed)).tolist()
    validating = min(max(round(total * validation_fraction), 1), total - 1)
    wanted = min(MOST_HELD_OUT, max(1, round(images * HELD_OUT_SHARE)))
    last = images - min(max(wanted - validating, 0), images - total)
    return Drawn(
        order[: total - validating], order[total - validating : total], order[total:last],
        order[last:],
    )  # fmt: skip


def seed_of(*of: Any) -> int:
    """A seed for something that numbers and names tell apart, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:7], "little")


def in_whole_batches(images: ImageSet, batch: int | None) -> ImageSet:
    """Return all images, or the first that fill batches of a fixed size."""
    return images if batch is None else images.subset(range(len(images) // batch * batch))


@dataclass(frozen=True)
class Batches:
    """The batches of a set, in order, always the same; iterate as often as needed."""

    images: ImageSet
    batch_size: int
    workers: int = 0

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def after(self, number: int) -> Batches:
        """Those that come after so many."""
        left = range(min(number * self.batch_size, len(self.images)), len(self.images))
        return replace(self, images=self.images.subset(left)) if number else self

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        positions = range(len(self.images))
        chunks = [
            positions[start : start + self.batch_size]
            for start in range(0, len(positions), self.batch_size)
        ]
        read: Iterator[tuple[Any, Any] | DataError]
        if self.workers:
            read = batches_from_workers(self.images, chunks, self.workers)
        else:
            read = (self.images.batch(chunk) for chunk in chunks)
        first: dict[str, tuple[int, ...]] | None = None
        own = self.images.source.collates
        try:
            for chunk, batch in zip(chunks, read, strict=True):
                if isinstance(batch, DataError):
                    raise batch
                inputs, targets = batch
                one = mapped(inputs, lambda tensor: tensor[0])
                first = shapes(one) if first is None else first
                if self.batch_size > 1 and not own:
                    self.images.check_shape(one, chunk[0], first, 0)
                yield inputs, targets if own else self._targets(chunk)
        finally:
            del read  # ends the workers now, not when a traceback that holds them is let go

    def _targets(self, chunk: range) -> Any:
        """What a batch has beside its images.

        Raises:
            DataError: The images' targets differ in shape or kind.
        """
        try:
            return collated([self.images.target(p) for p in chunk])
        except ValueError as error:
            raise DataError(
                f"The targets of {self.images.source.described} cannot be put into one batch "
                f"({error}); give targets of one shape, or pass --batch-size 1."
            ) from error


@dataclass(frozen=True)
class Loader:
    """How images reach a network, made once and handed on.

    Attributes:
        batch_size: How many images a batch holds; the last may hold fewer.
        workers: Processes that decode images; 0 decodes in this one.
        device: Where inputs are put.
        memory_format: What four-dimensional inputs are put in, ``"contiguous"`` or
            ``"channels_last"``.
    """

    batch_size: int
    workers: int = 0
    device: torch.device | str = "cpu"
    memory_format: str = "contiguous"

    def batches(self, images: ImageSet) -> Batches:
        """Return the batches of a set, as they come from the disk."""
        return Batches(images, self.batch_size, 0 if images.held else self.workers)

    def placed(self, images: ImageSet) -> Iterator[tuple[Any, Any]]:
        """Yield the batches with their inputs on the device and in the memory format."""
        for inputs, targets in self.batches(images):
            yield placed(inputs, self.device, self.memory_format), targets


def first_inputs(images: ImageSet, most: int) -> Any:
    """Return the inputs of the first images as one batch, up to the first of another size."""
    chosen = images.subset(range(min(most, len(images))))
    batches_of_one = Batches(chosen, 1)
    found: list[Any] = []
    for inputs, _ in batches_of_one:
        if found and shapes(inputs) != shapes(found[0]):
            break
        found.append(inputs)
    return concatenated(found)


def batches(images: ImageSet, batch_size: int, workers: int = 0) -> Batches:
    """Return the inputs ``[B, C, H, W]`` and targets of a set, in order.

    Class numbers are int64 ``[B]``; for other targets see `compress.data.targets.collated`.

    Iterating raises `DataError` where an image cannot be read or differs in shape, or a worker
    dies or hangs.

    Args:
        images: The set.
        batch_size: How many images a batch holds; the last may hold fewer.
        workers: Processes that decode images; 0 decodes in this one.
    """
    return Loader(batch_size, workers).batches(images)
