"""Pictures that also come mirrored and shifted, for statistics that few of them would not fill."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from compress.data.images import ImageSet
from compress.data.loading import seed_of
from compress.vision.augment import NONE, augmented


@dataclass(frozen=True, eq=False)
class VariedImages(ImageSet):
    """A set of pictures, followed by changed copies of all of them, made whenever they are read.

    Attributes:
        images: The pictures as they are.
        kind: How the copies are changed; see `compress.vision.augment`.
        copies: How often all of them come again.
        seed: Decides each change, together with the picture's position and the copy's number.
    """

    images: ImageSet | None = None
    kind: str = NONE
    copies: int = 0
    seed: int = 0

    @classmethod
    def of(cls, images: ImageSet, kind: str, copies: int, seed: int) -> VariedImages:
        """Vary a set of pictures, of a source that does not collate them itself."""
        return cls(
            images.source, images.preprocessing, [*images.indices] * (1 + copies),
            images.class_names, images.label_order, images, kind, copies, seed,
        )  # fmt: skip

    @property
    def held(self) -> bool:
        """Whether reading an image decodes nothing."""
        return self._images.held

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the pictures' own, and of how they are varied."""
        how = (self._images.fingerprint, self.kind, self.copies, self.seed)
        return hashlib.sha256(repr(how).encode()).hexdigest()

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return one picture's input and its label; as `ImageSet`."""
        picture, label = self._images[index % len(self._images)]
        return self._changed(picture[None], [index])[0], label

    def stack(self, positions: Sequence[int]) -> Any:
        """Return the inputs at some positions as one batch; as `ImageSet`."""
        own = len(self._images)
        whole = range(positions[0] % own, positions[0] % own + len(positions))
        contiguous = isinstance(positions, range) and positions.step == 1 and whole.stop <= own
        inputs = self._images.stack(whole if contiguous else [p % own for p in positions])
        return self._changed(inputs, positions)

    def target(self, index: int) -> Any:
        """Return what the picture has beside it, which no change is made to."""
        return self._images.target(index % len(self._images))

    def subset(self, positions: Sequence[int]) -> ImageSet:
        """Raise `TypeError`: a copy is known by its position, which a subset does not keep."""
        raise TypeError(f"{len(positions)} of varied pictures cannot be a set of their own")

    @property
    def _images(self) -> ImageSet:
        assert self.images is not None
        return self.images

    def _changed(self, inputs: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        own = len(self._images)
        if max(positions) < own:
            return inputs
        parts = [
            part if position < own else augmented(part, self.kind, seed_of(self.seed, position))
            for part, position in zip(inputs.split(1), positions, strict=True)
        ]
        return torch.cat(parts)
