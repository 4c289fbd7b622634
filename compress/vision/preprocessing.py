"""How a picture becomes the network's input."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from compress.errors import DataError, near_matches
from compress.vision.pictures import image_to_array

_PIL_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}

# What pictures are brought to: one number for a side, or a height and a width.
Size = int | tuple[int, int]

# Pixels of one picture after resizing: as many as Pillow warns of, a gigabyte as three channels.
LARGEST_RESIZED = 2**30 // 12


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the network's input; the empty record only scales it to [0, 1].

    Attributes:
        mean: Per-channel mean taken off after scaling to [0, 1]; empty for none.
        std: Per-channel divisor; as many numbers as ``mean``.
        resize: Length in pixels that the shorter side is resized to, keeping the aspect ratio; or
            the height and width that pictures are resized to, whatever their aspect ratio.
        crop: Side in pixels of the square cut from the centre, or height and width of the
            rectangle.
        interpolation: ``"bilinear"``, ``"bicubic"`` or ``"nearest"``, always antialiased.
        channels: 1 or 3 where pictures are to be read as grey or RGB; None takes the number from
            ``mean``, and RGB without one.
        from_preset: Whether these are a model's own defaults rather than what the user asked for.
            Tensors that a user's Dataset has already transformed are then left as they are.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: Size | None = None
    crop: Size | None = None
    interpolation: str = "bilinear"
    channels: int | None = None
    from_preset: bool = False

    def __post_init__(self) -> None:
        problem = ""
        if len(self.mean) != len(self.std):
            problem = f"mean has {len(self.mean)} numbers and std has {len(self.std)}"
        elif any(s <= 0 for s in self.std):
            problem = "std holds a number that is not positive"
        elif self.channels is not None and self.mean and self.channels != len(self.mean):
            problem = f"the images have {self.channels} channels and mean {len(self.mean)} numbers"
        elif self.interpolation not in _PIL_FILTERS:
            problem = (
                f"interpolation {self.interpolation!r} is unknown."
                f"{near_matches(self.interpolation, _PIL_FILTERS)}"
            )
        if problem:
            raise DataError(f"The image preprocessing cannot be used: {problem}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def is_identity(self) -> bool:
        """Whether pictures are only scaled to [0, 1]."""
        return not self.mean and self.resize is None and self.crop is None


def image_to_tensor(image: Image.Image, preprocessing: Preprocessing, name: str) -> Tensor:
    """Turn a PIL image in mode L or RGB into float32 ``[C, H, W]``.

    Resizes with PIL's own filter as torchvision does on PIL images, so that published accuracies
    are met to the pixel.

    Raises:
        DataError: The image is smaller than the crop, or its channels do not match the mean.
    """
    if preprocessing.resize is not None:
        height, width = _resized(image.height, image.width, preprocessing.resize, name)
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), _PIL_FILTERS[preprocessing.interpolation])
    pixels = torch.from_numpy(image_to_array(image)).permute(2, 0, 1)
    return _cropped_and_normalised(_scaled(pixels), preprocessing, name)


def pixels_to_tensor(pixels: Tensor, preprocessing: Preprocessing, name: str) -> Tensor:
    """Turn pixels ``[..., C, H, W]`` into float32 of the same rank, resized and normalised.

    uint8 is scaled to [0, 1]; floating values are taken to be in the wanted scale already.

    Raises:
        DataError: The pixels are smaller than the crop, or their channels do not match the mean.
    """
    values = _scaled(pixels)
    if preprocessing.resize is not None:
        size = _resized(values.shape[-2], values.shape[-1], preprocessing.resize, name)
        if size != tuple(values.shape[-2:]):
            smooth = preprocessing.interpolation != "nearest"
            flat = values.reshape(-1, *values.shape[-3:])
            flat = F.interpolate(
                flat, size, mode=preprocessing.interpolation, antialias=smooth,
                align_corners=False if smooth else None,
            )  # fmt: skip
            values = flat.reshape(*values.shape[:-2], *size)
    return _cropped_and_normalised(values, preprocessing, name)


def _scaled(pixels: Tensor) -> Tensor:
    return pixels.float().div(255) if pixels.dtype == torch.uint8 else pixels.float()


def size_text(size: Size) -> str:
    """Return a size as flags take it: ``"224"`` or ``"64,256"``."""
    return str(size) if isinstance(size, int) else ",".join(map(str, size))


def _resized(height: int, width: int, wanted: Size, name: str) -> tuple[int, int]:
    """The size wanted, or that with the shorter side as wanted, the longer in whole pixels.

    Raises:
        DataError: A picture far longer than wide would become a huge one.
    """
    if not isinstance(wanted, int):
        size = wanted
    elif height <= width:
        size = wanted, int(wanted * width / height)
    else:
        size = int(wanted * height / width), wanted
    if size[0] * size[1] > LARGEST_RESIZED:
        raise DataError(
            f"The image {name} is {height}x{width} pixels and would become {size[0]}x{size[1]}; "
            "pass a smaller --resize, or take the image away."
        )
    return size


def _cropped_and_normalised(values: Tensor, preprocessing: Preprocessing, name: str) -> Tensor:
    mean = preprocessing.mean
    if preprocessing.crop is not None:
        values = _cropped(values, preprocessing.crop, name)
    if mean:
        if values.shape[-3] != len(mean):
            raise DataError(
                f"The image {name} has {values.shape[-3]} channels, but --mean and --std have "
                f"{len(mean)} numbers; give one number a channel."
            )
        shape = (len(mean), 1, 1)
        values = (values - torch.tensor(mean).view(shape)) / torch.tensor(preprocessing.std).view(
            shape
        )
    return values.contiguous()


def _cropped(values: Tensor, crop: Size, name: str) -> Tensor:
    high, wide = (crop, crop) if isinstance(crop, int) else crop
    height, width = values.shape[-2:]
    if height < high or width < wide:
        asked = f"{crop}" if isinstance(crop, int) else f"{high}x{wide}"
        raise DataError(
            f"The image {name} is {height}x{width} pixels, smaller than the crop of {asked}; "
            f"pass --resize {size_text(crop)} or more, or a smaller --crop."
        )
    # Python's round, to the even neighbour, is what torchvision's centre crop uses.
    top, left = round((height - high) / 2), round((width - wide) / 2)
    return values[..., top : top + high, left : left + wide]
