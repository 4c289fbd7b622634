"""A set of images, whatever it came from: items, labels, names, a fingerprint, checks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from compress.data.targets import UNLABELLED
from compress.errors import DataError
from compress.running.structure import main_tensor, mapped, shapes
from compress.running.structure import tensors as tensors_of
from compress.vision.pictures import image_to_array
from compress.vision.preprocessing import Preprocessing, image_to_tensor, pixels_to_tensor

Shapes = dict[str, tuple[int, ...]]


class Source(Protocol):
    """Where images come from; `ImageSet` turns what it gives into inputs of the network."""

    @property
    def described(self) -> str:
        """What it is, for messages: ``"the folder pets/test"``."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels; empty where there are no labels."""
        ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> Any:
        """Return a PIL image in mode L or RGB, a tensor ``[C, H, W]``, or a structure of several.

        Raises:
            DataError: The image cannot be read.
        """
        ...

    def stack(self, indices: Sequence[int]) -> Tensor | None:
        """Return ``[B, C, H, W]`` at once where that is cheaper than one by one, else None."""
        ...

    def label(self, index: int) -> int:
        """Return the class number, -1 where there is none."""
        ...

    def target(self, index: int) -> Any:
        """Return what a loss or a metric gets: the class number, or whatever is in its place."""
        ...

    def name(self, index: int) -> str:
        """Return what the user knows the image by: the file's path in its folder, or its index."""
        ...

    def content(self, index: int) -> bytes:
        """Return bytes that change when the image, its name or its label does."""
        ...

    @property
    def transformed(self) -> bool:
        """Whether tensors have gone through the user's own transforms already."""
        ...

    @property
    def collates(self) -> bool:
        """Whether the source makes batches in a way of its own."""
        ...

    def collated(self, indices: Sequence[int]) -> tuple[Any, Any]:
        """Return a batch's inputs and targets, as the source itself makes them of its items.

        Raises:
            DataError: They cannot be read, or put into one batch.
        """
        ...


class OneByOne:
    """A source whose batches are made of its items, by `ImageSet`."""

    collates = False

    def collated(self, indices: Sequence[int]) -> tuple[Any, Any]:
        """Raise `TypeError`: there are no batches of the source's own."""
        raise TypeError(f"{type(self).__name__} makes no batch of {len(indices)} items")


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images of one source, by index, as the network takes them.

    Attributes:
        source: Where the images come from.
        preprocessing: How they become inputs.
        indices: Which of the source's images, in order.
        class_names: Class names in the order of the labels.
        label_order: New label by the source's label, where a class map gives one.
    """

    source: Source
    preprocessing: Preprocessing
    indices: Sequence[int]
    class_names: tuple[str, ...]
    label_order: tuple[int, ...] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the labels; empty for unlabelled images."""
        return self.class_names

    @property
    def held(self) -> bool:
        """Whether the inputs are in memory, so that reading an image decodes nothing."""
        return False

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return one image's inputs and its label (-1 where there is none).

        The inputs are a float32 tensor ``[C, H, W]``, or whatever structure a user's dataset gives.

        Raises:
            DataError: The image cannot be read or does not suit the preprocessing; it is named.
        """
        image = self.source.image(self.indices[index])
        return self._inputs(image, self.name(index)), self.label(index)

    def _inputs(self, image: Any, name: str, axes: int = 0) -> Any:
        """What a source gives, as the network takes it; ``axes`` of it count images."""
        if isinstance(image, Tensor):
            whole = not image.is_floating_point() and image.dtype != torch.uint8
            if whole and image.dim() - axes < 3:
                return image  # numbers of words and the like, which are no pixels
            return self._from_pixels(image, name)
        if isinstance(image, Image.Image):
            return image_to_tensor(image, self.preprocessing, name)
        return mapped(image, lambda t: t.float() if t.is_floating_point() else t)

    def batch(self, positions: Sequence[int]) -> tuple[Any, Any]:
        """Return the inputs at some positions, and their targets where the source collates them.

        Raises:
            DataError: As `stack`.
        """
        if not self.source.collates:
            return self.stack(positions), None
        image, targets = self.source.collated([self.indices[p] for p in positions])
        return self._inputs(image, self.name(positions[0]), axes=1), targets

    def stack(self, positions: Sequence[int]) -> Any:
        """Return the inputs at some positions as one batch: ``[B, C, H, W]``, or a structure.

        Raises:
            DataError: An image cannot be read, or two differ in shape; they are named.
        """
        pixels = self.source.stack([self.indices[p] for p in positions])
        if pixels is not None:
            return self._inputs(pixels, self.name(positions[0]), axes=1)
        tensors = [self[p][0] for p in positions]
        for position, tensor in zip(positions, tensors, strict=True):
            self.check_shape(tensor, position, shapes(tensors[0]), positions[0])
        others = [iter(tensors_of(inputs).values()) for inputs in tensors[1:]]
        return mapped(tensors[0], lambda t: torch.stack([t, *(next(other) for other in others)]))

    def check_shape(self, inputs: Any, position: int, expected: Shapes, first: int) -> None:
        """Raise `DataError` naming both images where the inputs of two differ in shape."""
        found = shapes(inputs)
        if found.keys() != expected.keys():
            raise DataError(
                f"The inputs of {self.source.described} differ in structure: {self.name(first)} "
                f"has {_listed(expected)}, {self.name(position)} {_listed(found)}."
            )
        for path, shape in found.items():
            if shape != expected[path]:
                before, after = ("x".join(map(str, s)) for s in (expected[path], shape))
                what = f"images of {self.source.described}"
                if path:
                    what = f"inputs {path} of {self.source.described}"
                raise DataError(
                    f"The {what} differ in size: {self.name(first)} becomes {before}, "
                    f"{self.name(position)} {after}; pass --resize H,W, or --resize N with "
                    "--crop N, to bring them to one size, or --batch-size 1 where the network "
                    "takes any."
                )

    def target(self, index: int) -> Any:
        """Return what a loss or a metric gets for one image: its label, or what is in its place."""
        if self.label_order is not None:
            return self.label(index)
        return self.source.target(self.indices[index])

    def label(self, index: int) -> int:
        """Return the class number of one image, in the class map's order; -1 where it has none."""
        label = self.source.label(self.indices[index])
        if self.label_order is None or label == UNLABELLED:
            return label
        return self.label_order[label]

    @cached_property
    def labels(self) -> tuple[int, ...]:
        """All class numbers in order; where the source knows them, no image is decoded."""
        return tuple(self.label(i) for i in range(len(self)))

    def name(self, index: int) -> str:
        """Return the image's file, relative to its folder, or its index in the source."""
        return self.source.name(self.indices[index])

    def raw(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return one image before any preprocessing, uint8 ``[H, W, C]`` with C 1 or 3.

        Floating pixels beyond [0, 1] are stretched from their smallest to their largest value.
        """
        image = self.source.image(self.indices[index])
        if isinstance(image, Image.Image):
            return image_to_array(image)
        image = main_tensor(image)
        pixels = image if image.ndim == 3 else image.reshape(1, 1, -1)
        pixels = pixels if pixels.shape[0] in (1, 3) else pixels[:1]
        if pixels.dtype != torch.uint8:
            low, high = float(pixels.min()), float(pixels.max())
            low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
            pixels = ((pixels.float() - low) / max(high - low, 1e-12) * 255).round().byte()
        return pixels.permute(1, 2, 0).contiguous().numpy()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what this set holds: every image's name, label and content, in order.

        The preprocessing counts too, because it decides what the network sees. The way the set
        was named does not, nor do times, nor other images of the same source. Files are hashed
        whole while they come to less than `sources.WHOLE_BYTES`, beyond that by size and both
        ends; items of a user's Dataset are sampled.
        """
        digest = hashlib.sha256(json.dumps(self.preprocessing.to_dict()).encode())
        digest.update(len(self).to_bytes(8, "little"))
        for index in self.indices:
            content = self.source.content(index)
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
        if self.label_order is not None:  # the same labels then mean other classes
            digest.update(json.dumps(list(self.label_order)).encode())
        return digest.hexdigest()

    def subset(self, positions: Sequence[int]) -> ImageSet:
        """Return the images at some positions of this set, in the order given."""
        return replace(self, indices=[self.indices[p] for p in positions])

    def _from_pixels(self, pixels: Tensor, name: str) -> Tensor:
        # Where a user's Dataset gave finished inputs, a model's default preset is not for them.
        default = self.preprocessing.from_preset or self.preprocessing.is_identity
        if self.source.transformed and pixels.is_floating_point() and default:
            return pixels.float()
        return pixels_to_tensor(pixels, self.preprocessing, name)


def _listed(found: Shapes) -> str:
    return ", ".join(path or "one tensor" for path in found) or "no tensor"


# --- Checks ------------------------------------------------------------------------------------


def check_labels(images: ImageSet, classes: int) -> tuple[str, ...]:
    """Check that labels can be compared with a network's outputs.

    Args:
        images: The set.
        classes: How many outputs the network has.

    Returns:
        Warnings: sentences for the summary.

    Raises:
        DataError: No labels, labels beyond the outputs, or all images of one class.
    """
    where = images.source.described
    labels = images.labels
    unlabelled = labels.count(UNLABELLED)
    if unlabelled:
        raise DataError(
            f"{unlabelled} of the {len(labels)} images of {where} have no labels, so accuracy "
            "cannot be measured; pass a folder with one folder per class, or arrays with 'labels'."
        )
    worst = max(range(len(labels)), key=labels.__getitem__)
    if labels[worst] >= classes or min(labels) < 0:
        raise DataError(
            f"The labels of {where} do not fit the network: {images.name(worst)} has label "
            f"{labels[worst]}, but there are {classes} outputs (labels 0 to {classes - 1}); pass "
            "the model's own number of classes, or --class-map."
        )
    counts = Counter(labels)
    warnings = []
    if len(counts) == 1:
        names = images.classes
        only = names[labels[0]] if labels[0] < len(names) else str(labels[0])
        message = f"All images of {where} are of one class ({only!r}), so accuracy says nothing"
        if len(labels) > 1 and classes > 1:
            raise DataError(
                f"{message}; pass a set with all classes (for imagefolder: the folder that holds "
                "one folder per class)."
            )
        warnings.append(message + ".")
    if images.classes and len(images.classes) != classes:
        warnings.append(
            f"{where} has {len(images.classes)} classes and the network {classes} outputs; labels "
            "follow the order of the set's classes unless --class-map says otherwise."
        )
    return tuple(warnings)


def check_channels(images: ImageSet, channels: int) -> None:
    """Check that images have the channels that a network's first layer takes.

    Raises:
        DataError: They have not.
    """
    tensor, _ = images[0]
    if isinstance(tensor, Tensor) and tensor.ndim == 3 and tensor.shape[0] != channels:
        raise DataError(
            f"The images of {images.source.described} have {tensor.shape[0]} channels, the "
            f"network takes {channels}; pass images with {channels}, or the model's own number "
            "of input channels."
        )
