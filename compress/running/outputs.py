"""What a network's outputs are: logits, probabilities, or something else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SUM = 1e-3
_LEAST = 1e-12


def are_class_scores(output: Tensor) -> bool:
    """Whether an output ``[batch, classes]`` can be that of a classifier."""
    return output.dim() == 2 and output.shape[1] > 1


def are_probabilities(output: Tensor) -> bool:
    """Whether every row of ``[batch, classes]`` is a distribution, as a softmax gives."""
    with torch.no_grad():
        if not are_class_scores(output) or not output.is_floating_point():
            return False
        sums = output.float().sum(1)
        return bool((output >= 0).all()) and bool(((sums - 1).abs() < _SUM).all())


def to_logits(outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what turns a network's outputs into logits, decided by some of its outputs.

    Decided once, so that two networks that are compared, and all batches, are read alike.

    Args:
        outputs: ``[batch, ...]``, of the original network.

    Returns:
        The logarithm for a softmax's probabilities, and for all else the outputs as they are.
    """
    if are_probabilities(outputs):
        return lambda output: output.clamp_min(_LEAST).log()
    return lambda output: output
