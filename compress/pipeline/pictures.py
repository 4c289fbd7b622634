"""Pictures before and after, of tasks whose outputs are such: small, few, the same every time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.data import ImageSet, Loader
from compress.measure.by_task import some_targets
from compress.measure.outputs import result_of
from compress.report.page import Panels
from compress.report.text import TIMES
from compress.result import Result
from compress.running.outputs import Reading
from compress.running.structure import tensors
from compress.tasks.masks import SEGMENTATION, predicted
from compress.tasks.pictures import RESTORATION, picture_range
from compress.vision.pictures import thumbnail

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# Pixels of the longer side; with five examples of four pictures a page grows by a megabyte at most.
SIDE = 112
# A difference is shown so much brighter, at most.
_MOST_GAIN = 64


@dataclass(frozen=True)
class Pair:
    """The original and the compressed network.

    Attributes:
        original: The network as it came, in float32.
        compressed: As it is saved.
        reading: What their outputs stand for.
    """

    original: nn.Module
    compressed: nn.Module
    reading: Reading


def task_panels(result: Result, pair: Pair, images: ImageSet | None) -> dict[int, Panels]:
    """Return pictures of the test set's examples, by index; none where outputs are no pictures.

    Raises:
        DataError: An image cannot be read.
        ModelError: A forward fails.
    """
    test = result.test
    if images is None or test is None or test.task not in (SEGMENTATION.name, RESTORATION.name):
        return {}
    made = _masks if test.task == SEGMENTATION.name else _pictures
    panels = {}
    for example in test.examples:
        outputs = _outputs(pair, images, example.index)
        if outputs is not None:
            given = ("Input", thumbnail(images.raw(example.index), SIDE))
            panels[example.index] = (given, *made(outputs, pair.reading, images, example.index))
    return panels


def _outputs(pair: Pair, images: ImageSet, index: int) -> tuple[Tensor, Tensor] | None:
    """Return what both networks make of one image ``[1, C, H, W]``; None for what is none."""
    path = pair.reading.parts[0].path
    ((given, _),) = Loader(1).batches(images.subset([index]))
    found = []
    for model in (pair.original, pair.compressed):
        output = tensors(result_of(model, given, "on an image to be shown"))[path]
        if output.dim() != 4:
            return None
        found.append(output)
    return found[0], found[1]


def _masks(
    outputs: tuple[Tensor, Tensor], reading: Reading, images: ImageSet, index: int
) -> Panels:
    size = images.target(index).shape[-2:]
    before, after = (predicted(output, reading.parts[0], size)[0].numpy() for output in outputs)
    changed = np.where(before != after, 255, 0).astype(np.uint8)[..., None]
    share = float((before != after).mean())
    return (
        ("Original", thumbnail(coloured(before), SIDE)),
        ("Compressed", thumbnail(coloured(after), SIDE)),
        (f"Changed pixels, {share:.1%}", thumbnail(changed, SIDE)),
    )


def coloured(classes: np.ndarray[Any, Any]) -> Pixels:
    """Return class numbers ``[H, W]`` in the colours of PASCAL VOC, which tell 256 apart."""
    colours = np.zeros((*classes.shape, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[..., channel] |= (((classes >> (3 * bit + channel)) & 1) << (7 - bit)).astype(
                np.uint8
            )
    return colours


def _pictures(
    outputs: tuple[Tensor, Tensor], _reading: Reading, images: ImageSet, _index: int
) -> Panels:
    low, high = picture_range(some_targets(images))
    before, after = ((output[0] - low).clamp(0, high - low) / (high - low) for output in outputs)
    difference = (after - before).abs()
    gain = _gain(float(difference.max()))
    return (
        ("Original", thumbnail(_bytes(before), SIDE)),
        ("Compressed", thumbnail(_bytes(after), SIDE)),
        (f"Difference {TIMES}{gain}", thumbnail(_bytes((difference * gain).clamp(max=1)), SIDE)),
    )


def _gain(largest: float) -> int:
    """Return the power of two by which the largest difference is still shown as it is."""
    if largest <= 0:
        return 1
    return int(min(_MOST_GAIN, 2 ** max(0, math.floor(math.log2(1 / largest)))))


def _bytes(picture: Tensor) -> Pixels:
    """Return a picture ``[C, H, W]`` from 0 to 1 as bytes ``[H, W, 1 or 3]``."""
    picture = picture if len(picture) in (1, 3) else picture[:1]
    scaled: Pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return scaled
