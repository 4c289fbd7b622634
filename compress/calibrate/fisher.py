"""The Fisher information by random vectors: a loss whose gradients have it as their covariance.

The Fisher information of a classifier at an image is ``Jᵀ F J``, with ``J`` the Jacobian of the
logits and ``F = diag(p) - p pᵀ`` that of the softmax. The usual estimate samples a label from ``p``
and takes the gradient of its negative log-likelihood (Martens & Grosse 2015); where the model is
sure of itself, nearly all draws then say nothing and a few rare ones everything. ``F = L Lᵀ`` with
``L = (I - p 1ᵀ) diag(√p)``, so the gradient ``Jᵀ L s`` with random signs ``s`` has the same
covariance, but every image always contributes its whole trace. No labels are needed.

Outputs that are probabilities already are taken back to logits (`compress.running.outputs`). Of
outputs that are no logits at all, such as pictures, every element counts alike: gradients along
random signs then have ``Jᵀ J`` as their covariance, that of the squared error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compress.running.outputs import are_class_scores, to_logits

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Objective:
    """The summed loss of batches that come in order: the user's own, or one of Fisher's.

    Args:
        images: How many the batches hold together.
        seed: Of the random signs.
        own: ``(output, labels) -> summed loss`` for outputs that are not logits.
    """

    def __init__(self, images: int, seed: int, own: LossFunction | None = None) -> None:
        self.signs, self.own, self.seen = RandomSigns(images, seed), own, 0
        self.logits: Callable[[Tensor], Tensor] | None = None

    def __call__(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of the next batch."""
        if self.own:
            return self.own(output, labels)
        start = self.seen
        self.seen += len(output)
        if are_class_scores(output):
            self.logits = self.logits or to_logits(output)
            return fisher_loss(self.logits(output), self.signs.take(start, output))
        return (output * self.signs.every(start, output)).sum()


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

    def every(self, start: int, output: Tensor) -> Tensor:
        """Signs of every element of images ``start ...``, in the shape of their outputs."""
        drawn = torch.empty(output.shape, dtype=torch.int8)
        for row, image in enumerate(range(start, start + len(output))):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + image)
            drawn[row] = torch.randint(0, 2, output.shape[1:], generator=generator)
        return (2 * drawn - 1).to(output)


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
