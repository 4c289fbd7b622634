"""The Fisher information by random vectors: a loss whose gradients have it as their covariance.

The Fisher information of a classifier at an image is ``Jᵀ F J``, with ``J`` the Jacobian of the
logits and ``F = diag(p) - p pᵀ`` that of the softmax. The usual estimate samples a label from ``p``
and takes the gradient of its negative log-likelihood (Martens & Grosse 2015); where the model is
sure of itself, nearly all draws then say nothing and a few rare ones everything. ``F = L Lᵀ`` with
``L = (I - p 1ᵀ) diag(√p)``, so the gradient ``Jᵀ L s`` with random signs ``s`` has the same
covariance, but every image always contributes its whole trace. No labels are needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compress.errors import CalibrationError

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Objective:
    """The summed loss of batches that come in order: the user's own, or `fisher_loss`.

    Args:
        images: How many the batches hold together.
        seed: Of the random signs.
        own: ``(output, labels) -> summed loss`` for outputs that are not logits.
    """

    def __init__(self, images: int, seed: int, own: LossFunction | None = None) -> None:
        self.signs, self.own, self.seen = RandomSigns(images, seed), own, 0

    def __call__(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of the next batch.

        Raises:
            CalibrationError: There is no loss of the user's own, and the output is not logits.
        """
        if self.own:
            return self.own(output, labels)
        if output.dim() != 2 or output.shape[1] < 2:
            raise CalibrationError(
                f"The model's output of shape {tuple(output.shape)} is not a batch of logits, so "
                "that it predicts no labels. Pass a loss of your own (--loss-fn "
                "package.module:function), or use --metric mse."
            )
        signs = self.signs.take(self.seen, output)
        self.seen += len(output)
        return fisher_loss(output, signs)


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
