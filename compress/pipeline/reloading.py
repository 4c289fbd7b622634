"""Whether a saved model is the one in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from compress.artefact.model import load
from compress.errors import ArtefactError
from compress.network.baking import copied
from compress.network.baseline import Network
from compress.running.forward import evaluation_mode, run_model
from compress.running.structure import like_weights, tensors


def check_reload(model: nn.Module, network: Network, path: Path) -> None:
    """Load a saved model and compare it with the one in memory, bit by bit.

    Args:
        model: What was saved.
        network: What it was made from.
        path: The file.

    Raises:
        ArtefactError: They differ.
    """
    reloaded = load(path, model=copied(network.original).cpu())
    reference = next(model.parameters())
    images = like_weights(network.example, reference)
    reloaded = reloaded.to(reference.device)
    # Each in its own block: both draw the same random numbers, and count no calls in buffers.
    with torch.no_grad(), evaluation_mode(model):
        expected = run_model(model, images)
    with torch.no_grad(), evaluation_mode(reloaded):
        found = run_model(reloaded, images)
    own, loaded = model.state_dict(), reloaded.state_dict()
    same = own.keys() == loaded.keys() and all(_same_bits(own[k], loaded[k]) for k in own)
    first, second = tensors(expected), tensors(found)
    same = same and first.keys() == second.keys()
    if not same or not all(_same_bits(first[p], second[p]) for p in first):
        raise ArtefactError(
            "The saved model, read back, does not equal the one in memory, and was not kept. "
            "This is a defect of compress or of the disk: please report it."
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal; NaN, which the original may hold, equals itself."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    first, second = (x.detach().reshape(-1).contiguous().view(torch.uint8) for x in (one, other))
    return torch.equal(first, second)
