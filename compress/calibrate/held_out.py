"""What rewritten layers lose on images that they were not fitted to, all layers in one pass.

Changing a layer's output by ``e_p`` at positions ``p`` changes an image's loss by ``Σ_p g_pᵀ e_p``
to first order, and half the mean square of that over images, with the gradients of
`compress.calibrate.fisher`, is the second-order increase that calibration predicts. Here the errors
are those of the new layers on the original's inputs, of images that nobody has seen: what a metric
left out, and what was fitted by heart, shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibrate.collect import stream
from compress.calibrate.recipe import Recipe
from compress.calibrate.statistics import Source
from compress.network.narrowing import Cut

# How much more than predicted a layer may lose on held-out images: even two standard errors less,
# and even one standard error less.
TOLERANCES = (2.0, 2.0), (1.0, 4.0)


@dataclass(frozen=True)
class HeldOutLoss:
    """What a layer loses on held-out images.

    Attributes:
        mean: Increase of the objective per image.
        error: Standard error of the mean.
    """

    mean: float
    error: float

    @classmethod
    def of(cls, losses: Tensor) -> HeldOutLoss:
        """What some images' losses say, ``[images]``; one image says nothing of the error."""
        spread = float(losses.std()) if len(losses) > 1 else math.inf
        return cls(float(losses.mean()), spread / math.sqrt(len(losses)))


def held_out_losses(
    cut: Cut,
    pair: tuple[nn.Module, nn.Module],
    names: Iterable[str],
    batches: Iterable[tuple[Any, Any]],
    how: tuple[Source, Recipe],
) -> dict[str, HeldOutLoss]:
    """Measure what each rewritten layer loses alone, on its original input.

    Args:
        cut: Which channels the rewritten network still has.
        pair: The dense baseline and the rewritten network.
        names: Names of the rewritten layers.
        batches: Held-out inputs and targets.
        how: How many images these are, and how statistics of the others were taken.

    Returns:
        By layer; layers whose batch axis does not count images are left out.
    """
    model, rewritten = pair
    source, recipe = how
    before = dict(model.named_modules(remove_duplicate=False))
    after = dict(rewritten.named_modules(remove_duplicate=False))
    watchers = {before[n]: _Watcher(n, after[n], cut, weigh=recipe.weigh) for n in names}
    stream(model, watchers, batches, source, recipe)
    return {w.name: w.finish() for w in watchers.values() if w.losses and not w.odd}


class _Watcher:
    """The hook of one layer: sums ``g·e`` over an image's positions, over all its calls."""

    def __init__(self, name: str, layer: nn.Module, cut: Cut, *, weigh: bool) -> None:
        self.name, self.layer, self.cut, self.weigh = name, layer, cut, weigh
        self.losses: list[Tensor] = []
        self.batch, self.odd = 0, False

    def begin(self, start: int, batch: int) -> None:
        """Get ready for a batch."""
        del start
        self.batch = batch
        self.losses.append(torch.zeros(batch, dtype=torch.float64))

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Compare the layer with its replacement on the input that it was given."""
        del module
        if output.shape[0] % self.batch:
            self.odd = True
            return
        found = self.layer(self.cut.inputs_of(self.name, inputs[0].detach())).detach()
        error = found - self.cut.outputs_of(self.name, output.detach())
        into = self.losses[-1]
        if not self.weigh:
            into += self._summed(error.square())
        elif output.requires_grad:

            def hook(gradient: Tensor) -> None:
                into.add_(self._summed(self.cut.outputs_of(self.name, gradient) * error))

            output.register_hook(hook)

    def _summed(self, values: Tensor) -> Tensor:
        return values.reshape(self.batch, -1).double().sum(1).cpu()

    def finish(self) -> HeldOutLoss:
        """The mean over all images."""
        changes = torch.cat(self.losses)
        return HeldOutLoss.of(0.5 * (changes.square() if self.weigh else changes))


def ratios(
    predicted: Mapping[str, float], *measured: Mapping[str, HeldOutLoss]
) -> dict[str, float]:
    """How much more each layer loses than was predicted, where that is no accident.

    A layer is taken at its measured loss if even two standard errors less is more than twice what
    was predicted, or one standard error less more than four times. A stricter check would punish
    those layers whose few images happened to be hard ones, which costs more than it mends. A layer
    of which no loss was predicted, because it only gives fewer outputs, is measured to lose what
    rounding makes of it, which says nothing.

    Args:
        predicted: By layer.
        measured: In one way or several; the worst counts.

    Returns:
        Factors above one, by layer; layers that keep what was promised are left out.
    """
    found: dict[str, float] = {}
    for losses in measured:
        for name, loss in losses.items():
            promised = predicted.get(name, 0.0)
            if promised > 0 and any(
                loss.mean - errors * loss.error > times * promised for errors, times in TOLERANCES
            ):
                found[name] = max(loss.mean / promised, found.get(name, 1.0))
    return found
