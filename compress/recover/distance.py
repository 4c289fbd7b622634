"""How far a network's outputs are from those of the original that it learns from.

Class scores are compared at a temperature, so that the unlikely classes teach as well (Hinton et
al., "Distilling the Knowledge in a Neural Network", 2015). A network that is nearly the original
learns more from each image at a high one, where all scores count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import ModelError
from compress.running.outputs import Part, Reading
from compress.running.structure import cloned, floating, mapped, with_gradients

Function = Callable[[Any, Any], Tensor]
_APART = (
    "The compressed network's outputs differ in shape from the original's for the same images, as "
    "a detector's do that finds more or fewer things, so that they cannot be compared; pass "
    "--loss-fn package.module:function (outputs, originals) -> summed loss to compress recover."
)


@dataclass(frozen=True)
class Distance:
    """What a network is trained and judged by.

    Attributes:
        reading: What the outputs stand for.
        temperature: What class scores are divided by.
        function: The user's own summed loss of the network's and the original's results, in place
            of all that.
    """

    reading: Reading
    temperature: float = 4.0
    function: Function | None = None

    def taught(self, result: Any) -> Any:
        """Return what has to be kept of the original's result for some images."""
        if self.function is not None or not self.reading.parts:
            return result
        return tuple(self.reading.outputs(result))

    def training(self, taught: Any, result: Any, images: int) -> Tensor:
        """Return the loss of a batch, a scalar: the mean over its images.

        Args:
            taught: What `taught` made of the original's result.
            result: The network's own.
            images: How many images the batch holds.

        Raises:
            ModelError: The results cannot be compared.
        """
        if self.function is not None:
            return self.function(result, cloned(taught)) / images
        if not self.reading.parts:
            return _all_values(taught, result)
        return self._apart(taught, result).sum() / images

    def held_out(self, taught: Any, result: Any, images: int) -> Tensor:
        """Return how far results are apart, ``[images]``; arguments as `training`.

        Raises:
            ModelError: The results cannot be compared.
        """
        if self.function is not None:
            # It is held to giving something that gradients can be taken of, also here.
            with torch.enable_grad():
                value = self.function(with_gradients(result), cloned(taught))
            return (value.detach().double() / images).expand(images)
        if not self.reading.parts:
            return _all_values(taught, result).double().expand(images)
        return self._apart(*(mapped(x, _doubled) for x in (taught, result)))

    def _apart(self, taught: Any, result: Any) -> Tensor:
        """How far the outputs that count are apart, ``[images]``."""
        triples = zip(self.reading.parts, taught, self.reading.outputs(result), strict=True)
        found = [self._loss(part, old, new) for part, old, new in triples]
        return torch.stack([x.flatten(1).sum(1) if x.dim() > 1 else x for x in found]).sum(0)

    def _loss(self, part: Part, old: Tensor, new: Tensor) -> Tensor:
        """The loss of one output, place by place."""
        if old.shape != new.shape:
            raise ModelError(_APART)
        if part.kind == "classes":
            heat = self.temperature
            p, q = (_precise(part.logits(t)).div(heat).log_softmax(1) for t in (old, new))
            return F.kl_div(q, p, log_target=True, reduction="none") * heat**2
        if part.kind == "answers":
            p, q = (_precise(part.logits(t)) for t in (old, new))
            own = F.binary_cross_entropy_with_logits(p, p.sigmoid(), reduction="none")
            return F.binary_cross_entropy_with_logits(q, p.sigmoid(), reduction="none") - own
        return _precise(new - old).square() * (part.weight / 2)


def _all_values(taught: Any, result: Any) -> Tensor:
    """Mean squared error of all real outputs, a scalar, each output counting the same.

    Raises:
        ModelError: Their shapes differ.
    """
    old, new = floating(taught), floating(result)
    if {k: t.shape for k, t in old.items()} != {k: t.shape for k, t in new.items()}:
        raise ModelError(_APART)
    losses = [
        _precise(new[path] - t).square().mean() / _precise(t).square().mean().clamp_min(1e-12)
        for path, t in old.items()
        if t.dim() > 1 and t.numel()
    ]
    if not losses:
        raise ModelError(
            "None of the outputs has an axis of images and another one, so that nothing says how "
            "far they are apart; pass --loss-fn package.module:function (outputs, originals) -> "
            "summed loss."
        )
    return torch.stack(losses).sum(0)


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _precise(tensor: Tensor) -> Tensor:
    """In single precision at least, which mixed precision is not."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
