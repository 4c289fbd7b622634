"""Images that a ``torch.utils.data.Dataset`` gives, torchvision's or the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from compress.data.targets import UNLABELLED, as_target, class_number, content
from compress.errors import DataError, what_raised
from compress.vision.pictures import convert_image

T = TypeVar("T")

_SAMPLED_ITEMS = 1000  # how many items a fingerprint looks at


@dataclass(frozen=True, eq=False)
class DatasetSource:
    """Items of a ``torch.utils.data.Dataset``: an image, a pair with a label, or a dict."""

    dataset: Any
    spec: str
    classes: tuple[str, ...]
    targets: Sequence[Any] | None
    size: int
    channels: int | None
    transformed: bool = True

    @classmethod
    def of(cls, dataset: Any, spec: str, channels: int | None) -> DatasetSource:
        """Check that a dataset has a length and usable items.

        Args:
            dataset: The dataset.
            spec: What the user named it by.
            channels: 1 or 3 where PIL images are to be converted; None leaves grey images grey.

        Raises:
            DataError: It has not.
        """
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
        source = cls(dataset, spec, classes, targets if usable else None, size, channels)
        source.image(0)
        source.target(0)
        return source

    @property
    def described(self) -> str:
        """The spec."""
        return f"the set {self.spec}"

    def __len__(self) -> int:
        return self.size

    def _item(self, index: int) -> tuple[Any, Any]:
        try:
            item = self.dataset[index]
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, and whatever else the user's code raises
            raise DataError(
                f"Item {index} of {self.spec} cannot be read: {what_raised(error)}."
            ) from error
        if isinstance(item, dict):
            if "image" not in item:
                raise DataError(
                    f"Item {index} of {self.spec} is a dict with {', '.join(map(str, item))}; "
                    "it must have 'image' and may have 'label'."
                )
            return item["image"], item.get("label", UNLABELLED)
        if isinstance(item, list | tuple):
            return (item[0], item[1]) if len(item) > 1 else (item[0], UNLABELLED)
        return item, UNLABELLED

    def image(self, index: int) -> Image.Image | Tensor:
        """Return the item's image: PIL as L or RGB, arrays ``[H, W(, C)]`` as tensors."""
        image, _ = self._item(index)
        if isinstance(image, Image.Image):
            own = 1 if image.mode in ("1", "L", "I;16") else 3
            return convert_image(image, self.channels or own)
        if isinstance(image, np.ndarray):
            pixels = torch.from_numpy(image.copy())
            return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]
        if isinstance(image, Tensor):
            return image
        raise DataError(
            f"Item {index} of {self.spec} is a {type(image).__name__}; it must be a tensor, a PIL "
            "image or an array."
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
        pixels = image.contiguous().numpy() if isinstance(image, Tensor) else np.asarray(image)
        head = f" {pixels.dtype} {pixels.shape}:"
        return content(self.target(index)) + head.encode() + pixels.tobytes()


def _asked(spec: str, what: str, question: Callable[[], T]) -> T:
    """Ask a user's dataset something, whose code may raise anything."""
    try:
        return question()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise DataError(f"{spec} cannot be used: {what} raised {what_raised(error)}.") from error
