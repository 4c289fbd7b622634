"""Restoration: pictures from pictures, judged by the peak signal-to-noise ratio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress.tasks.record import (
    MeanScorer,
    Measure,
    Setup,
    Task,
    as_values,
    require_torchmetrics,
)

# A picture restored without any error would have no finite ratio.
MOST_DECIBELS = 100.0
# The window of SSIM, eleven pixels wide, is mirrored at the edges by half of that.
_LEAST_SIDE = 11
# What networks give and take; the first that holds all of some targets.
_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))
_ROUNDING = 1e-3


class _Scorer(MeanScorer):
    """Ratios of the single pictures; their mean is what papers report."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        package = require_torchmetrics(RESTORATION.name)
        self.functions = package.functional.image
        self.setup, self.range = setup, picture_range(setup.targets)
        self.similar: list[Tensor] = []

    def add(self, result: Any, targets: Any) -> None:
        output = self.setup.output(result)
        if not isinstance(targets, Tensor) or targets.shape != output.shape:
            shape = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise RESTORATION.misfit(
                f"a batch has targets {shape} beside outputs {list(output.shape)}"
            )
        target = as_picture(targets).to(output.dtype)
        output = output.clamp(*self.range)
        axes = tuple(range(1, output.dim()))
        ratio = self.functions.peak_signal_noise_ratio(
            output, target, data_range=self.range[1] - self.range[0], reduction="none", dim=axes
        )
        self.rows.append(ratio.reshape(-1).clamp(max=MOST_DECIBELS))
        if output.dim() in (4, 5) and min(output.shape[2:]) >= _LEAST_SIDE:
            found = self.functions.structural_similarity_index_measure(
                output, target, data_range=self.range[1] - self.range[0], reduction="none"
            )
            self.similar.append(found.reshape(-1))

    def values(self) -> tuple[float | None, ...]:
        similar = float(torch.cat(self.similar).double().mean()) if self.similar else None
        return float(self.each().mean()), similar


def as_picture(target: Tensor) -> Tensor:
    """Return a picture in real numbers; bytes from 0 to 255 become 0 to 1, as inputs do."""
    return target if target.is_floating_point() else target.float() / 255


def picture_range(targets: Sequence[Any]) -> tuple[float, float]:
    """Return the smallest and largest value that pictures may have, by some of them.

    Raises:
        DataError: They fit no usual range.
    """
    pictures = [as_picture(t) for t in targets if isinstance(t, Tensor) and t.numel()]
    low = min((float(t.min()) for t in pictures), default=0.0)
    high = max((float(t.max()) for t in pictures), default=1.0)
    for least, most in _RANGES:
        if low >= least - _ROUNDING and high <= most + _ROUNDING:
            return least, most
    raise RESTORATION.misfit(
        f"these reach from {low:.3g} to {high:.3g}: without a known range there is no ratio. Give "
        "pictures from 0 to 1, -1 to 1 or 0 to 255, or pass --metric-fn"
    )


def _accepts(target: Any) -> bool:
    return isinstance(target, Tensor) and target.dim() >= 2 and not target.is_complex()


def _fits(output: Tensor, target: Any) -> bool:
    return output.dim() >= 3 and (target is None or output.shape[1:] == target.shape)


RESTORATION = Task(
    name="restoration",
    measures=(Measure("PSNR", "dB"), Measure("SSIM")),
    targets="a picture of the output's shape, such as [C, H, W], for each image",
    accepts=_accepts,
    looks_for="an output of the target's shape",
    fits=_fits,
    read=as_values,
    scorer=_Scorer,
)
