"""The Fisher information by random vectors: a loss whose gradients have it as their covariance.

The Fisher information of a classifier at an image is ``Jᵀ F J``, with ``J`` the Jacobian of the
logits and ``F = diag(p) - p pᵀ`` that of the softmax. The usual estimate samples a label from ``p``
and takes the gradient of its negative log-likelihood (Martens & Grosse 2015); where the model is
sure of itself, nearly all draws then say nothing and a few rare ones everything. ``F = L Lᵀ`` with
``L = (I - p 1ᵀ) diag(√p)``, so the gradient ``Jᵀ L s`` with random signs ``s`` has the same
covariance, but every image always contributes its whole trace. No labels are needed.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RandomSigns:
    """Seeded signs for every image and class, the same however the images are batched."""

    def __init__(self, images: int, seed: int) -> None:
        self.images, self.seed = images, seed
        self.table: Tensor | None = None

    def take(self, start: int, logits: Tensor) -> Tensor:
        """Signs ``[batch, classes]`` of images ``start ...``, in the logits' dtype and device."""
        if self.table is None:
            generator = torch.Generator().manual_seed(self.seed)
            shape = (self.images, logits.shape[1])
            self.table = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
        return (2 * self.table[start : start + len(logits)] - 1).to(logits)


def fisher_loss(logits: Tensor, signs: Tensor) -> Tensor:
    """Return a sum over images whose gradients have the Fisher information as second moment.

    Args:
        logits: ``[batch, classes]``.
        signs: Independent random signs of the same shape.
    """
    with torch.no_grad():
        p = torch.softmax(logits.double(), dim=1)
        signed = p.sqrt() * signs
        direction = signed - p * signed.sum(1, keepdim=True)
    return (logits * direction.to(logits)).sum()
