"""Images decoded once and kept in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from compress.data.images import ImageSet
from compress.data.loading import Batches, Loader, Split
from compress.data.targets import size
from compress.errors import DataError
from compress.progress import Track, silent
from compress.running.structure import concatenated, count, mapped, part, shapes
from compress.running.structure import size as size_of_inputs

# Sets whose decoded images take more than this are decoded again whenever they are read.
HELD_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class HeldImages(ImageSet):
    """A set whose inputs are in memory, ``[N, ...]``; otherwise the set it was made from.

    Attributes:
        inputs: The inputs: a tensor, or a structure of them.
        targets: What each image has beside it; None where they would take too much.
    """

    inputs: Any = field(default_factory=lambda: torch.empty(0))
    targets: tuple[Any, ...] | None = None

    @property
    def held(self) -> bool:
        """Whether reading an image decodes nothing."""
        return True

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return one image's inputs and its label."""
        return mapped(self.inputs, lambda tensor: tensor[index]), self.label(index)

    def target(self, index: int) -> Any:
        """Return what one image has beside it."""
        return super().target(index) if self.targets is None else self.targets[index]

    def stack(self, positions: Sequence[int]) -> Any:
        """Return the inputs at some positions as one batch."""
        if isinstance(positions, range) and positions.step == 1:
            return part(self.inputs, positions.start, positions.stop)
        return self._chosen(positions)

    def _chosen(self, positions: Sequence[int]) -> Any:
        chosen = torch.as_tensor(list(positions), dtype=torch.long)
        return mapped(self.inputs, lambda tensor: tensor[chosen])

    def subset(self, positions: Sequence[int]) -> ImageSet:
        """Return the images at some positions of this set, in the order given."""
        chosen = self._chosen(positions)
        targets = None if self.targets is None else tuple(self.targets[p] for p in positions)
        indices = [self.indices[p] for p in positions]
        return replace(self, indices=indices, inputs=chosen, targets=targets)


def hold(
    images: ImageSet, loader: Loader, track: Track = silent, cap: int = HELD_BYTES
) -> ImageSet:
    """Decode a set into memory.

    Args:
        images: The set.
        loader: How it is decoded.
        track: Progress.
        cap: Bytes that it may take.

    Returns:
        The set with its inputs held; or as it is where they would take more than ``cap``, differ in
        size, or come in batches of the source's own making.

    Raises:
        DataError: An image cannot be read, or two differ in shape.
    """
    if images.held or not len(images) or images.source.collates:
        return images
    loaded = loader.batches(images)
    parts: list[Any] = []
    for inputs, _ in track(loaded, "read images", len(loaded)):
        if not parts and size_of_inputs(inputs) // count(inputs) * len(images) > cap:
            return images
        if parts and shapes(part(inputs, 0, 1)) != shapes(part(parts[0], 0, 1)):
            return images
        parts.append(inputs)
    return HeldImages(
        images.source,
        images.preprocessing,
        images.indices,
        images.class_names,
        images.label_order,
        concatenated(parts),
        _held_targets(images, cap),
    )


def _held_targets(images: ImageSet, cap: int) -> tuple[Any, ...] | None:
    if size(images.target(0)) * len(images) > cap:
        return None
    return tuple(images.target(i) for i in range(len(images)))


@dataclass
class ReadOnce:
    """The batches of a set, read as far as they are asked for, and kept for the next time.

    They end before one that cannot be read, since whoever reads them could do without.

    Attributes:
        batches: They.
        cap: Bytes that may be kept; what is beyond is read again.
        unread: Why they ended; empty where nothing was in the way.
    """

    batches: Batches
    cap: int = HELD_BYTES
    unread: str = ""
    _kept: list[tuple[Any, Any]] = field(default_factory=list)
    _bytes: int = 0

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Yield inputs and targets, batch by batch."""
        yield from tuple(self._kept)
        batches = iter(self.batches.after(len(self._kept)))
        while True:
            try:
                inputs, targets = next(batches)
            except StopIteration:
                return
            except DataError as error:
                self.unread = str(error)
                return
            taken = size_of_inputs(inputs) + size(targets)
            if self._bytes + taken <= self.cap:
                self._kept.append((inputs, targets))
                self._bytes += taken
            else:
                self._bytes = self.cap  # those kept are the first ones, without gaps
            yield inputs, targets


def hold_split(split: Split, loader: Loader, track: Track = silent) -> Split:
    """Decode the images to fit and to validate on into memory, as far as each fits; see `hold`."""
    return replace(
        split,
        fit=hold(split.fit, loader, track),
        validation=hold(split.validation, loader, track),
    )
