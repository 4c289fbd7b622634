"""Images and torchvision: the one module that imports it, and how a picture becomes a tensor."""

from __future__ import annotations

import functools
import inspect
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch import library as operators

from compress.errors import DataError, ModelError, near_matches

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_PIL_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the network's input; the empty record only scales it to [0, 1].

    Attributes:
        mean: Per-channel mean taken off after scaling to [0, 1]; empty for none.
        std: Per-channel divisor; as many numbers as ``mean``.
        resize: Length in pixels that the shorter side is resized to, keeping the aspect ratio.
        crop: Side in pixels of the square cut from the centre.
        interpolation: ``"bilinear"``, ``"bicubic"`` or ``"nearest"``, always antialiased.
        channels: 1 or 3 where pictures are to be read as grey or RGB; None takes the number from
            ``mean``, and RGB without one.
        from_preset: Whether these are a model's own defaults rather than what the user asked for.
            Tensors that a user's Dataset has already transformed are then left as they are.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: int | None = None
    crop: int | None = None
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


def thumbnail(pixels: np.ndarray[Any, np.dtype[np.uint8]], side: int = 64) -> bytes:
    """Encode an image uint8 ``[H, W, C]`` as a small PNG, its longer side ``side`` pixels."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Small images are enlarged without blurring, so that their pixels can be seen.
    filter_ = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    buffer = io.BytesIO()
    image.resize(size, filter_).save(buffer, "PNG")
    return buffer.getvalue()


# --- Pictures to tensors -----------------------------------------------------------------------


def read_image(path: Path, channels: int) -> Image.Image:
    """Read a picture file as grey (``channels`` 1) or RGB (3).

    Raises:
        DataError: The file is no picture, is truncated, or has a pixel type beyond 8 or 16 bits.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return convert_image(image, channels)
    except DataError:
        raise
    # PIL reports damage as OSError, SyntaxError (PNG), ValueError or a "bomb" of its own.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"The image {path} cannot be read: {_one_line(error)}; replace it or take it away."
        ) from error


def convert_image(image: Image.Image, channels: int) -> Image.Image:
    """Convert a PIL image to mode L (``channels`` 1) or RGB (3).

    Raises:
        DataError: 32-bit pixels, whose range is not known.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(
            f"An image has 32-bit pixels (mode {image.mode}), whose range is not known; "
            "convert it to 8 or 16 bits."
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")


def image_to_array(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a PIL image in mode L or RGB as uint8 ``[H, W, C]``."""
    array = np.array(image, dtype=np.uint8)  # a copy: torch takes no read-only memory
    return array[:, :, None] if array.ndim == 2 else array


def image_to_tensor(image: Image.Image, preprocessing: Preprocessing, name: str) -> Tensor:
    """Turn a PIL image in mode L or RGB into float32 ``[C, H, W]``.

    Resizes with PIL's own filter as torchvision does on PIL images, so that published accuracies
    are met to the pixel.

    Raises:
        DataError: The image is smaller than the crop, or its channels do not match the mean.
    """
    if preprocessing.resize is not None:
        height, width = _resized(image.height, image.width, preprocessing.resize)
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
        size = _resized(values.shape[-2], values.shape[-1], preprocessing.resize)
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


def _resized(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Size with the shorter side at ``shorter``, the longer in whole pixels."""
    if height <= width:
        return shorter, int(shorter * width / height)
    return int(shorter * height / width), shorter


def _cropped_and_normalised(values: Tensor, preprocessing: Preprocessing, name: str) -> Tensor:
    crop, mean = preprocessing.crop, preprocessing.mean
    if crop is not None:
        height, width = values.shape[-2:]
        if height < crop or width < crop:
            raise DataError(
                f"The image {name} is {height}x{width} pixels, smaller than the crop of {crop}; "
                f"pass --resize {crop} or more, or a smaller --crop."
            )
        # Python's round, to the even neighbour, is what torchvision's centre crop uses.
        top, left = round((height - crop) / 2), round((width - crop) / 2)
        values = values[..., top : top + crop, left : left + crop]
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


# --- torchvision -------------------------------------------------------------------------------


@functools.cache
def load_torchvision() -> tuple[ModuleType, Any]:
    """Import torchvision; the second value keeps alive the schemas that the import may need.

    A torchvision built for CUDA beside a CPU torch cannot load its compiled operators, and its
    import then fails with "operator torchvision::nms does not exist". Models, datasets and
    transforms use none of them, so naming the two operators that it registers shapes for is
    enough. Nothing is defined where the plain import works.
    """
    library = None
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        # torch leaves both methods untyped.
        library = operators.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(schema)  # type: ignore[no-untyped-call]
        import torchvision
    return torchvision, library


def torchvision_model_names() -> tuple[str, ...]:
    """Return the names of torchvision's classification models."""
    torchvision, _ = load_torchvision()
    return tuple(torchvision.models.list_models(module=torchvision.models))


def torchvision_model(name: str, **arguments: Any) -> nn.Module:
    """Build one of torchvision's classification models, with random weights unless asked.

    Raises:
        ModelError: An unknown name or argument, or weights that cannot be fetched.
    """
    torchvision, _ = load_torchvision()
    names = torchvision_model_names()
    if name not in names:
        raise ModelError(
            f"torchvision has no classification model {name!r}.{near_matches(name, names)} "
            f"It has {len(names)}, among them resnet18, mobilenet_v2 and vit_b_16."
        )
    if name in ("googlenet", "inception_v3"):
        # Their own initialisation takes a minute and warns; a checkpoint follows anyway.
        arguments.setdefault("init_weights", False)
    try:
        model: nn.Module = torchvision.models.get_model(name, **arguments)
    except OSError as error:  # urllib's errors are OSErrors
        raise ModelError(
            f"The weights {arguments.get('weights')!r} of torchvision's {name} could not be "
            f"fetched: {_one_line(error)}. Download the file elsewhere and pass it as the "
            "checkpoint, with the model spec free of 'weights'."
        ) from error
    except Exception as error:
        raise ModelError(
            f"torchvision's {name} cannot be built with {arguments or 'its defaults'}: "
            f"{type(error).__name__}: {_one_line(error)}.{_near_arguments(name, arguments)}"
        ) from error
    return model


def _near_arguments(name: str, arguments: Mapping[str, Any]) -> str:
    """Near matches of the arguments that a model does not take, read off the class it is of."""
    torchvision, _ = load_torchvision()
    builder = inspect.unwrap(torchvision.models.get_model_builder(name))
    made = get_type_hints(builder).get("return", builder)
    known = list(inspect.signature(made).parameters)
    return "".join(near_matches(a, known) for a in arguments if a not in known)


def torchvision_preset(name: str, image_size: int | None = None) -> Preprocessing:
    """Return the preprocessing of a torchvision model's default weights.

    Args:
        name: A name in `torchvision_model_names`.
        image_size: The side that the model was built for, where it takes no other (ViT); some
            default weights are for a larger one.
    """
    torchvision, _ = load_torchvision()
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    resize, crop = preset.resize_size[0], preset.crop_size[0]
    if image_size is not None and image_size != crop:
        resize, crop = image_size, image_size
    return Preprocessing(
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        resize=resize,
        crop=crop,
        interpolation=preset.interpolation.value,
        from_preset=True,
    )


def torchvision_dataset(name: str, **arguments: Any) -> Any:
    """Open one of torchvision's datasets, fetching it into ``root`` where it is not there yet.

    Returns:
        A ``torch.utils.data.Dataset`` of PIL images and labels.

    Raises:
        DataError: An unknown name or argument, or files that are absent and cannot be fetched.
    """
    torchvision, _ = load_torchvision()
    names = [
        n
        for n in torchvision.datasets.__all__
        if isinstance(getattr(torchvision.datasets, n), type)
    ]
    if name not in names:
        raise DataError(
            f"torchvision has no dataset {name!r}.{near_matches(name, names)} Pictures of your "
            "own go in as imagefolder:DIR, arrays as tensors:FILE.npz."
        )
    build = getattr(torchvision.datasets, name)
    root = arguments.get("root")
    remove_root = root is not None and not Path(str(root)).exists()
    try:
        try:
            return build(**arguments)
        except (RuntimeError, OSError) as error:
            if "download" not in str(error) or "download" in arguments:
                raise
            return build(**arguments, download=True)
    except (RuntimeError, OSError) as error:
        if remove_root:
            _remove_empty(Path(str(root)))
        raise DataError(
            f"The torchvision set {name} is not in root={root!r} and could not be fetched: "
            f"{_one_line(error)}. Put its files there by hand, or pass the images as "
            "imagefolder:DIR, tensors:FILE.npz or idx:IMAGES.gz,LABELS.gz."
        ) from error
    except Exception as error:
        raise DataError(
            f"The torchvision set {name} cannot be opened with {arguments}: "
            f"{type(error).__name__}: {_one_line(error)}."
        ) from error


def _remove_empty(root: Path) -> None:
    """Remove a folder tree that a failed download made and left without a file in it."""
    if root.is_dir() and not any(p.is_file() for p in root.rglob("*")):
        for folder in sorted((p for p in root.rglob("*") if p.is_dir()), reverse=True):
            folder.rmdir()
        root.rmdir()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
