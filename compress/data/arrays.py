"""Images that lie in arrays: ``tensors:FILE.npz``, ``tensors:FILE.safetensors`` and IDX files."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.data.images import OneByOne
from compress.data.npz import check_npz
from compress.data.targets import UNLABELLED, as_target, class_number, content
from compress.errors import DataError, near_matches
from compress.running.structure import count, mapped, tensors
from compress.untrusted import Unreadable, check_expansion, open_gzip
from compress.untrusted.tensors import MOST_AXES, read_tensors

_IDX_UINT8 = 0x08
# Labels beyond this are no classes: each would get a name.
MOST_CLASSES = 1_000_000


@dataclass(frozen=True, eq=False)
class ArraySource(OneByOne):
    """Images ``[N, C, H, W]`` in memory, uint8 or floating, with targets ``[N, ...]`` or none.

    In place of images there may be any inputs: a tensor ``[N, ...]`` or a structure of them.
    """

    described: str
    images: Any
    labels: Tensor | None
    classes: tuple[str, ...]
    transformed: bool = False

    def __len__(self) -> int:
        return count(self.images)

    def image(self, index: int) -> Any:
        """Return one image ``[C, H, W]``."""
        return mapped(self.images, lambda tensor: tensor[index])

    def stack(self, indices: Sequence[int]) -> Any:
        """Return several images ``[B, C, H, W]``."""
        chosen = torch.as_tensor(list(indices))
        return mapped(self.images, lambda tensor: tensor[chosen])

    def label(self, index: int) -> int:
        """Return the class number or -1."""
        return class_number(self.target(index))

    def target(self, index: int) -> Any:
        """Return the label or -1: a number, or what an array ``[N, ...]`` holds of the image."""
        return UNLABELLED if self.labels is None else as_target(self.labels[index])

    def name(self, index: int) -> str:
        """Return the index in the file, as words."""
        return f"number {index}"

    def content(self, index: int) -> bytes:
        """Return the label and pixels."""
        image = self.image(index)
        if not isinstance(image, Tensor):
            return content(self.target(index)) + b" " + content(image)
        head = f" {image.dtype} {tuple(image.shape)}:"
        return content(self.target(index)) + head.encode() + image.contiguous().numpy().tobytes()


def open_tensors(path: Path) -> ArraySource:
    """Read arrays ``images`` and, where given, ``labels`` from safetensors or npz.

    In place of ``images``, ``inputs`` ``[N, ...]`` reaches the forward as it is; so do several, by
    position (``inputs.0``, ``inputs.1``) or by name (``inputs.left``). ``targets`` is another name
    for ``labels``.

    Images are ``[N, H, W]``, ``[N, C, H, W]`` or ``[N, H, W, C]``; the last is recognised by an
    axis of 1 or 3 at the end and none at the second place.

    Raises:
        DataError: The file cannot be read, or its arrays have other names, shapes or types.
    """
    arrays = _read_arrays(path)
    labels = arrays.get("labels", arrays.get("targets"))
    inputs = _inputs(arrays, path)
    if inputs is not None:
        return replace(array_source(f"the file {path}", inputs, labels), transformed=True)
    if "images" not in arrays:
        raise DataError(
            f"The file {path} has no array 'images'; it holds {', '.join(arrays) or 'nothing'}."
            f"{near_matches('images', arrays)} Save the arrays as 'images' and 'labels', or "
            "anything but pictures as 'inputs'."
        )
    images = arrays["images"]
    if images.dtype in (torch.float16, torch.bfloat16, torch.float64):
        images = images.float()
    if images.dtype not in (torch.uint8, torch.float32):
        raise DataError(
            f"The images in {path} are {images.dtype}; save them as uint8 (0 to 255) or float32."
        )
    images = _as_channels_first(images, path)
    if images.dtype == torch.float32 and not bool(torch.isfinite(images).all()):
        raise DataError(f"The images in {path} hold NaN or infinite values.")
    return array_source(f"the file {path}", images, labels)


def _inputs(arrays: dict[str, Tensor], path: Path) -> Any:
    """The arrays that reach a forward as they are, as the structure that it takes; None for none.

    Raises:
        DataError: They hold different numbers of items, or NaN.
    """
    if "inputs" in arrays:
        named = {"inputs": arrays["inputs"]}
    else:
        named = {n.partition(".")[2]: a for n, a in arrays.items() if n.startswith("inputs.")}
    for name, array in named.items():
        if array.dtype in (torch.float16, torch.bfloat16, torch.float64):
            named[name] = array = array.float()
        if array.is_floating_point() and not bool(torch.isfinite(array).all()):
            raise DataError(f"The inputs {name} in {path} hold NaN or infinite values.")
    if "inputs" in arrays:
        return named["inputs"]
    if named and all(name.isdigit() for name in named):
        return tuple(named[name] for name in sorted(named, key=int))
    return named or None


def open_idx(images_path: Path, labels_path: Path | None) -> ArraySource:
    """Read images, and labels where given, from IDX files (MNIST's format), gzipped or plain.

    Raises:
        DataError: A file cannot be read, is not an IDX file of bytes, or their lengths differ.
    """
    images = _read_idx(images_path)
    if images.ndim not in (3, 4):
        raise DataError(
            f"The IDX file {images_path} holds an array of {images.ndim} axes, no images; "
            "write idx:IMAGES,LABELS in this order."
        )
    labels = None if labels_path is None else _read_idx(labels_path)
    return array_source(f"the file {images_path}", _as_channels_first(images, images_path), labels)


def array_source(described: str, images: Any, labels: Tensor | None) -> ArraySource:
    """Check images ``[N, C, H, W]`` or other inputs against labels and make a source of them.

    Raises:
        DataError: No images, or labels that are no N whole numbers from 0 (or -1 for none).
    """
    found = tensors(images)
    if any(array.ndim == 0 or len(array) == 0 for array in found.values()) or not found:
        raise DataError(f"{described} holds no images.")
    for array in found.values():
        if array.numel() == 0:
            raise DataError(
                f"The images of {described} have shape {list(array.shape)}: they hold no pixels."
            )
    lengths = {len(array) for array in found.values()}
    if len(lengths) > 1:
        each = ", ".join(f"{len(array)} of {path}" for path, array in found.items())
        raise DataError(f"The inputs of {described} differ in number: {each}.")
    (number,) = lengths
    classes: tuple[str, ...] = ()
    if labels is not None:
        if labels.shape[:1] != (number,):
            raise DataError(
                f"{described} holds {number} images, but labels of shape "
                f"{list(labels.shape)}; there must be one label an image."
            )
        if labels.is_complex():
            raise DataError(f"The labels of {described} are {labels.dtype}; save real numbers.")
        if labels.dim() == 1 and not labels.is_floating_point():
            labels, classes = _class_numbers(labels, described)
    contiguous = mapped(images, lambda array: array.contiguous())
    return ArraySource(described, contiguous, labels, classes)


def _class_numbers(labels: Tensor, described: str) -> tuple[Tensor, tuple[str, ...]]:
    """Check whole numbers ``[N]``; return them with the names of their classes.

    Raises:
        DataError: They are no class numbers.
    """
    if labels.dtype == torch.bool:
        raise DataError(f"The labels of {described} are {labels.dtype}, no whole numbers.")
    labels = labels.long()
    if int(labels.min()) < UNLABELLED:
        raise DataError(f"The labels of {described} reach down to {int(labels.min())}.")
    if int(labels.max()) >= MOST_CLASSES:
        raise DataError(
            f"The labels of {described} reach up to {int(labels.max())}, which is no class: labels "
            f"count classes from 0, and {MOST_CLASSES:,} are the most."
        )
    return labels, tuple(str(k) for k in range(int(labels.max()) + 1))


def _read_arrays(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path).tensors
        if path.suffix != ".npz":
            raise DataError(f"The file {path} is neither .safetensors nor .npz.")
        check_npz(path)
        # Opened here, because numpy leaves the file open where it is not an archive.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.array(file[name])) for name in file.files}
    except (
        OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"The file {path} cannot be read as arrays: {reason}.") from error


def _as_channels_first(images: Tensor, path: Path) -> Tensor:
    if images.ndim == 3:
        return images[:, None]
    if images.ndim != 4:
        raise DataError(
            f"The images in {path} have shape {list(images.shape)}; they must be [N, H, W], "
            "[N, C, H, W] or [N, H, W, C]. Give other inputs as package.module:factory of a "
            "Dataset."
        )
    if images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        return images.permute(0, 3, 1, 2)
    return images


def _read_idx(path: Path) -> Tensor:
    """Read an IDX file of unsigned bytes: two zero bytes, the type, the number of axes, sizes."""
    try:
        return _read_idx_body(path)
    except (OSError, Unreadable) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"The IDX file {path} cannot be read: {reason}.") from error


def _read_idx_body(path: Path) -> Tensor:
    with open_gzip(path) as file:
        start = file.read(4)
        if len(start) < 4 or start[:2] != b"\0\0" or start[2] != _IDX_UINT8:
            raise DataError(
                f"The file {path} is not an IDX file of bytes; those begin with 00 00 08, this "
                f"with {start[:3].hex(' ') or 'nothing'}."
            )
        axes = start[3]
        head = file.read(4 * axes)
        sizes = [int.from_bytes(head[4 * k : 4 * k + 4], "big") for k in range(axes)]
        expected = math.prod(sizes)
        # What is announced is believed only as far as the file may grow; one byte more shows
        # whether it holds more.
        check_expansion(path.stat().st_size, expected)
        body = file.read(expected + 1)
    if axes > MOST_AXES or len(head) < 4 * axes or len(body) != expected:
        held = "more" if len(body) > expected else f"{len(body)}"
        raise DataError(
            f"The IDX file {path} is damaged: it announces {sizes[:8]} values, {expected} bytes, "
            f"and holds {held}."
        )
    if not body:
        raise DataError(f"The IDX file {path} announces {sizes[:8]} values: it holds nothing.")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).reshape(sizes)
