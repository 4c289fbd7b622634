"""What a network's outputs are: logits, probabilities, or something else."""

from __future__ import annotations

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


def are_yes_or_no(output: Tensor) -> bool:
    """Whether every element is a probability of its own, as a sigmoid gives."""
    with torch.no_grad():
        inside = output.is_floating_point() and bool(((output > 0) & (output < 1)).all())
        return are_class_scores(output) and inside and not are_probabilities(output)


def as_logits(output: Tensor) -> Tensor:
    """Return logits ``[batch, classes]`` with the same softmax, or the same sigmoid.

    Probabilities of a softmax become their logarithms, those of a sigmoid its argument; what else
    there is, is taken for logits.
    """
    if are_probabilities(output):
        return output.clamp_min(_LEAST).log()
    if are_yes_or_no(output):
        return torch.logit(output, eps=1e-6)
    return output
