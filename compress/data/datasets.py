"""Images that a ``torch.utils.data.Dataset`` gives, torchvision's or the user's own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from compress.data.targets import UNLABELLED, as_target, class_number, content
from compress.errors import DataError, what_raised
from compress.running.structure import mapped, tensors
from compress.vision.pictures import convert_image

T = TypeVar("T")

_SAMPLED_ITEMS = 1000  # how many items a fingerprint looks at


_TARGETS = ("label", "labels", "target", "targets")


@dataclass(frozen=True)
class Arity:
    """How many inputs a network's forward takes by position.

    Attributes:
        needed: Those that it cannot do without, at least one.
        most: With those whose default is None.
    """

    needed: int = 1
    most: int = 1


@dataclass(frozen=True, eq=False)
class DatasetSource:
    """Items of a ``torch.utils.data.Dataset``, or the batches of a ``DataLoader``'s collate.

    An item is an input, inputs followed by a target, or a dict. A dict with ``image`` has its
    target under ``label``; of any other, what is called label or target is the target, and the rest
    reaches the forward by name.
    """

    dataset: Any
    spec: str
    classes: tuple[str, ...]
    targets: Sequence[Any] | None
    size: int
    channels: int | None
    transformed: bool = True
    arity: Arity = Arity()
    collate: Callable[[list[Any]], Any] | None = None

    @classmethod
    def of(
        cls, dataset: Any, spec: str, channels: int | None, arity: Arity = Arity()
    ) -> DatasetSource:
        """Check that a dataset has a length and usable items.

        Args:
            dataset: The dataset, or a ``DataLoader`` of one.
            spec: What the user named it by.
            channels: 1 or 3 where PIL images are to be converted; None leaves grey images grey.
            arity: How many inputs the network's forward takes, which says what of an item that is
                a tuple is an input.

        Raises:
            DataError: It has not.
        """
        collate = None
        if isinstance(dataset, DataLoader):
            own, alone = dataset.collate_fn, dataset.batch_size is None
            collate = None if own is default_collate or alone else own
            dataset = dataset.dataset
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise DataError(
                f"{spec} gives a {type(dataset).__name__}, not a Dataset with __len__ and "
                "__getitem__; streams cannot be split into fit and validation images."
            )
        size = _asked(spec, "its length", lambda: len(dataset))
        if size == 0:
            raise DataError(f"{spec} holds no images.")
        names = _asked(spec, "its classes", lambda: getattr(dataset, "classes", None))
        classes = tuple(str(n) for n in names) if isinstance(names, list | tuple) else ()
        targets = _asked(spec, "its targets", lambda: getattr(dataset, "targets", None))
        usable = isinstance(targets, list | tuple | Tensor | np.ndarray) and len(targets) == size
        known = targets if usable and collate is None else None
        source = cls(dataset, spec, classes, known, size, channels, arity=arity, collate=collate)
        source.image(0)
        source.target(0)
        return source

    @property
    def described(self) -> str:
        """The spec."""
        return f"the set {self.spec}"

    def __len__(self) -> int:
        return self.size

    @property
    def collates(self) -> bool:
        """Whether the batches are made by a collate function of the user's."""
        return self.collate is not None

    def _item(self, index: int) -> tuple[Any, Any]:
        if self.collate is not None:
            inputs, target = self.collated([index])
            return mapped(inputs, lambda tensor: tensor[0]), _first(target)
        return self._parted(self._raw(index), f"Item {index}")

    def _raw(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, and whatever else the user's code raises
            raise DataError(
                f"Item {index} of {self.spec} cannot be read: {what_raised(error)}."
            ) from error

    def collated(self, indices: Sequence[int]) -> tuple[Any, Any]:
        """Return the inputs and targets of a batch, as the user's own function puts them together.

        Raises:
            DataError: An item cannot be read, or the function fails.
        """
        items = [self._raw(index) for index in indices]
        assert self.collate is not None
        try:
            batch = self.collate(items)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise DataError(
                f"The collate function of {self.spec} raised {what_raised(error)}."
            ) from error
        inputs, targets = self._parted(batch, "A batch", 2)
        usable = self._usable(inputs, "A batch")
        for path, tensor in tensors(usable).items():
            if tensor.dim() == 0:
                raise DataError(
                    f"A batch of {self.spec} has a single number for all of its images"
                    f"{f' in {path}' if path else ''}; let the collate function give one for each "
                    "image, or leave it out and build it into the model."
                )
        return usable, targets

    def _parted(self, item: Any, what: str, axes: int = 1) -> tuple[Any, Any]:
        """Part an item, or a batch, into inputs and target; ``axes`` as `_inputs_in`."""
        if isinstance(item, Mapping):
            return self._parted_by_name(item, what)
        if isinstance(item, list | tuple) and not hasattr(item, "_fields"):
            count = self._inputs_in(item, what, axes)
            inputs, rest = item[:count], item[count:]
            return inputs[0] if count == 1 else tuple(inputs), (rest or [UNLABELLED])[0]
        return item, UNLABELLED

    def _inputs_in(self, item: Sequence[Any], what: str, axes: int) -> int:
        """How many parts of an item are inputs: those needed, or all but the last one.

        Args:
            item: Its parts, at least those that are needed.
            what: What it is, for messages.
            axes: A part with fewer is a single number an image, and may well be a target.
        """
        needed, most = self.arity.needed, self.arity.most
        if len(item) < needed:
            raise DataError(
                f"{what} of {self.spec} has {len(item)} parts, and the network takes "
                f"{needed} inputs; give them all, and then the target."
            )
        between = item[needed:-1]
        if not between or len(item) - 1 > most:
            return needed  # what follows the target is not looked at
        if all(isinstance(part, Tensor | np.ndarray) and part.ndim >= axes for part in between):
            return len(item) - 1
        raise DataError(
            f"{what} of {self.spec} has {len(item)} parts, and the network takes {needed} to "
            f"{'any number of' if most >= sys.maxsize else most} inputs, so that the target may be "
            "any but the first: give a dict with the names of the forward's arguments and 'label'."
        )

    def _parted_by_name(self, item: Mapping[str, Any], what: str) -> tuple[Any, Any]:
        if "image" in item:
            return item["image"], item.get("label", UNLABELLED)
        inputs = {key: value for key, value in item.items() if key not in _TARGETS}
        if not tensors(mapped_arrays(inputs)):
            raise DataError(
                f"{what} of {self.spec} is a dict with {', '.join(map(str, item))}; it must have "
                "'image' and may have 'label', or hold what the forward takes by name."
            )
        return inputs, next((item[key] for key in _TARGETS if key in item), UNLABELLED)

    def image(self, index: int) -> Any:
        """Return the item's inputs: PIL as L or RGB, arrays as tensors.

        Arrays of bytes ``[H, W(, C)]`` are pictures, whose channels come first after this.
        """
        return self._usable(self._item(index)[0], f"Item {index}")

    def _usable(self, image: Any, what: str) -> Any:
        if isinstance(image, Image.Image):
            own = 1 if image.mode in ("1", "L", "I;16") else 3
            return convert_image(image, self.channels or own)
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            # As pictures are read; other arrays are inputs already, as a DataLoader takes them.
            pixels = torch.from_numpy(image.copy())
            if pixels.ndim == 3 and pixels.shape[-1] in (1, 3, 4):
                return pixels.permute(2, 0, 1)
            return pixels[None] if pixels.ndim == 2 else pixels
        found = mapped_arrays(image)
        if tensors(found):
            return mapped(found, lambda tensor: tensor.detach())
        raise DataError(
            f"{what} of {self.spec} is a {type(image).__name__}; it must be a tensor, a PIL image "
            "or an array, or a tuple or dict of them."
        )

    def stack(self, indices: Sequence[int]) -> None:
        """Return None: items are read one by one."""
        del indices

    def label(self, index: int) -> int:
        """Return the class number, from ``targets`` where the dataset has them; -1 for none."""
        return class_number(self.target(index))

    def target(self, index: int) -> Any:
        """Return what the item has beside its image; see `compress.data.targets`."""
        return as_target(self._item(index)[1] if self.targets is None else self.targets[index])

    def name(self, index: int) -> str:
        """Return the index, as words."""
        return f"number {index}"

    def content(self, index: int) -> bytes:
        """Return the item's label and pixels, of large sets for evenly spaced items only."""
        if index % max(1, self.size // _SAMPLED_ITEMS):
            return b""
        image = self.image(index)
        if not isinstance(image, Tensor | Image.Image):
            return content(self.target(index)) + b" " + content(image)
        pixels = image.contiguous().numpy() if isinstance(image, Tensor) else np.asarray(image)
        head = f" {pixels.dtype} {pixels.shape}:"
        return content(self.target(index)) + head.encode() + pixels.tobytes()


def mapped_arrays(value: Any) -> Any:
    """Return a structure with its arrays and numbers as tensors."""
    if isinstance(value, Mapping):
        return {key: mapped_arrays(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return tuple(mapped_arrays(part) for part in value)
    if isinstance(value, np.ndarray | np.generic):
        return torch.from_numpy(np.array(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.tensor(value)
    return value


def _first(targets: Any) -> Any:
    """What a batch of one says of its only image, as far as it can be told apart."""
    if isinstance(targets, Tensor | list | tuple) and len(targets) == 1:
        return targets[0]
    return targets


def _asked(spec: str, what: str, question: Callable[[], T]) -> T:
    """Ask a user's dataset something, whose code may raise anything."""
    try:
        return question()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise DataError(f"{spec} cannot be used: {what} raised {what_raised(error)}.") from error
