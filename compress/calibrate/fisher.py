"""The Fisher information by random vectors: a loss whose gradients have it as their covariance.

The Fisher information of a classifier at an image is ``Jᵀ F J``, with ``J`` the Jacobian of the
logits and ``F = diag(p) - p pᵀ`` that of the softmax. The usual estimate samples a label from ``p``
and takes the gradient of its negative log-likelihood (Martens & Grosse 2015); where the model is
sure of itself, nearly all draws then say nothing and a few rare ones everything. ``F = L Lᵀ`` with
``L = (I - p 1ᵀ) diag(√p)``, so the gradient ``Jᵀ L s`` with random signs ``s`` has the same
covariance, but every image always contributes its whole trace. No labels are needed.

What outputs stand for is decided beforehand (`compress.running.outputs`). Probabilities are taken
back to logits. Of answers, each yes or no, ``F = diag(p (1 - p))``. Of values, such as pictures,
every element counts alike: gradients along random signs then have ``Jᵀ J`` as their covariance,
that of the squared error.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compress.running.outputs import LossFunction, Part, Reading, read_outputs


class Objective:
    """The summed loss of batches that come in order: the user's own, or one of Fisher's.

    Args:
        images: How many the batches hold together.
        seed: Of the random signs.
        own: ``(result, targets) -> summed loss`` in place of Fisher's.
        reading: What the network's outputs stand for; by default what the first result looks like.
    """

    def __init__(
        self,
        images: int,
        seed: int,
        own: LossFunction | None = None,
        reading: Reading | None = None,
    ) -> None:
        self.images, self.seed, self.own, self.reading = images, seed, own, reading
        self.signs: list[RandomSigns] = []
        self.seen = 0

    def __call__(self, result: Any, targets: Any) -> Tensor:
        """Return the loss of the next batch.

        Args:
            result: What the forward returned.
            targets: What the batch has beside its images; only the user's own loss looks at them.

        Raises:
            ModelError: The outputs are others than those that were read, or the user's own loss
                fails.
        """
        if self.own:
            return self.own(result, targets)
        self.reading = self.reading or read_outputs(result)
        outputs = self.reading.outputs(result)
        while len(self.signs) < len(outputs):  # of each output its own
            self.signs.append(RandomSigns(self.images, self.seed + 7919 * len(self.signs)))
        start, self.seen = self.seen, self.seen + len(outputs[0])
        losses = [
            _loss(part, output, signs, start)
            for part, output, signs in zip(self.reading.parts, outputs, self.signs, strict=True)
        ]
        # Of several outputs, one may lead to nothing that has gradients.
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss if loss.requires_grad else total
        return total


def _loss(part: Part, output: Tensor, signs: RandomSigns, start: int) -> Tensor:
    logits = part.logits(output)
    drawn = signs.take(start, logits) if part.kind == "classes" else signs.every(start, logits)
    if part.kind == "classes":
        return fisher_loss(logits, drawn)
    if part.kind == "answers":
        with torch.no_grad():
            p = logits.sigmoid()
            drawn = drawn * (p * (1 - p)).sqrt()
    return (logits * drawn).sum() * math.sqrt(part.weight)


class RandomSigns:
    """Seeded signs for every image and class, the same however the images are batched."""

    def __init__(self, images: int, seed: int) -> None:
        self.images, self.seed = images, seed
        self.table: Tensor | None = None

    def take(self, start: int, logits: Tensor) -> Tensor:
        """Signs ``[batch, classes, ...]`` of images ``start ...``, in the logits' shape."""
        if logits.dim() > 2 or start + len(logits) > self.images:  # more rows than images
            return self.every(start, logits)
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
        logits: ``[batch, classes, ...]``.
        signs: Independent random signs of the same shape.
    """
    with torch.no_grad():
        p = torch.softmax(logits.double(), dim=1)
        signed = p.sqrt() * signs
        direction = signed - p * signed.sum(1, keepdim=True)
    return (logits * direction.to(logits)).sum()
