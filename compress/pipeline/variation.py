"""Where there are few pictures to calibrate on, they also come mirrored and shifted.

The original needs no labels, so that whatever it was made for can be shown to it. What it was made
for, it tells itself: its outputs for changed pictures are distributed as those for pictures as they
are. A mirrored photograph is a photograph, a mirrored digit is none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.data import ImageSet, Loader
from compress.data.varied import VariedImages
from compress.linalg.energy import energy_distance
from compress.network.baseline import Network
from compress.running.forward import evaluation_mode, run_model
from compress.running.structure import placed
from compress.vision.augment import MIRRORED, MOVED, NONE, SHIFTED, are_pictures, augmented

# So many pictures are enough; fewer come again, so many times at most, and as far as all of them
# take no more multiply-accumulates than this to go through the network once, for the time it takes.
ENOUGH, MOST_COPIES, MOST_MACS = 1500, 3, 200e9
# Pictures that the original is asked about. Fewer than the least tell nothing.
ASKED, LEAST = 64, 8
# The distance of outputs, relative to that between pictures, up to which they are distributed
# alike. Mirrored photographs give 0.001 or less and shifted ones 0.003 at most; mirrored digits
# give 0.08, and photographs upside down 0.008 and more.
ALIKE = 0.005


def varied(images: ImageSet, network: Network, loader: Loader, seed: int) -> VariedImages | None:
    """Vary pictures to calibrate on, where they are few and the network knows such pictures.

    Args:
        images: The pictures, or whatever else the network takes.
        network: The dense baseline.
        loader: How inputs reach it.
        seed: Decides every change.

    Returns:
        The pictures with copies of them; None where there are to be none.

    Raises:
        DataError: An image cannot be read.
        ModelError: The forward fails.
    """
    if not LEAST <= len(images) < ENOUGH or images.source.collates or not network.reading.parts:
        return None
    first, _ = images[0]
    if not isinstance(first, Tensor) or not are_pictures(first[None]):
        return None
    wanted = math.ceil(ENOUGH / len(images))
    affordable = int(MOST_MACS / max(len(images) * network.macs, 1))
    copies = min(wanted - 1, affordable - 1, MOST_COPIES)
    kind = _known(images, network, loader) if copies > 0 else NONE
    return None if kind == NONE else VariedImages.of(images, kind, copies, seed)


def _known(images: ImageSet, network: Network, loader: Loader) -> str:
    """How pictures may be changed to stay such as the network knows."""
    asked = [images[position][0][None] for position in range(min(ASKED, len(images)))]
    plain = _features(asked, network, loader)
    if plain is None:
        return NONE

    def alike(changed: list[Tensor]) -> bool:
        found = _features(changed, network, loader)
        return found is not None and energy_distance(plain, found) <= ALIKE

    mirrored = alike([one.flip(3) for one in asked])
    shifted = alike([augmented(one, SHIFTED, seed) for seed, one in enumerate(asked)])
    if mirrored and shifted:
        return MOVED
    return MIRRORED if mirrored else SHIFTED if shifted else NONE


def _features(pictures: list[Tensor], network: Network, loader: Loader) -> Tensor | None:
    """What the network makes of pictures, ``[pictures, features]``: of maps, mean and spread.

    None where outputs do not lie picture by picture, or have other lengths for other pictures.
    """
    found = []
    sizes = {picture.shape for picture in pictures}
    step = loader.batch_size if len(sizes) == 1 else 1
    for start in range(0, len(pictures), step):
        batch = torch.cat(pictures[start : start + step])
        inputs = placed(batch, network.device, network.memory_format)
        with torch.no_grad(), evaluation_mode(network.model):
            result = run_model(network.model, inputs)
        outputs = network.reading.outputs(result)
        if any(t.dim() == 0 or len(t) != len(batch) for t in outputs):
            return None
        found.append(torch.cat([_summary(t.float()) for t in outputs], 1).cpu())
    return torch.cat(found) if len({f.shape[1] for f in found}) == 1 else None


def _summary(output: Tensor) -> Tensor:
    if output.dim() < 3:
        return output.reshape(len(output), -1)
    places = output.flatten(2)
    return torch.cat([places.mean(2), places.std(2, correction=0)], 1)
