"""What a few images tell of a network: what its outputs stand for, and which sizes it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.config import RunConfig
from compress.data import ImageSet, first_inputs
from compress.data.targets import UNLABELLED
from compress.inputs.load import batch_size_for
from compress.network.baseline import Evidence
from compress.running.structure import batched, main_tensor, placed, shapes

# Where batches hold one image, sizes may differ: how many images are looked at, and sizes tried.
LOOKED_AT, OTHER_SIZES = 16, 3


def evidence_of(sets: Sequence[ImageSet], example: Any, config: RunConfig) -> Evidence:
    """What images tell of a network: those of the first set that says something of them.

    Args:
        sets: The sets, of which one holds an image at least.
        example: The inputs of one image, where the network is.
        config: Batches.
    """
    known = [images for images in sets if len(images)]
    images = next((s for s in known if _is_known(s.target(0))), known[0])
    device = main_tensor(example).device
    batch = batch_size_for(config, example)
    # Several where the user wants one at a time; of large images as few as tell what lies in rows.
    most = LOOKED_AT if config.batch_size == 1 else max(batch, 2)
    targets = tuple(images.target(i) for i in range(min(most, len(images))))
    others: dict[str, Any] = {}
    for index in range(min(len(images), LOOKED_AT) if batch == 1 else 0):
        other = batched(images[index][0])
        if shapes(other) != shapes(example) and len(others) < OTHER_SIZES:
            others.setdefault(str(shapes(other)), placed(other, device))
    return Evidence(
        targets,
        lambda: placed(first_inputs(images, most), device),
        tuple(others.values()),
        config.task,
    )


def _is_known(target: Any) -> bool:
    return not (isinstance(target, int) and target == UNLABELLED)
