"""Regression: numbers for each image, judged by the mean absolute error."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from compress.tasks.record import (
    MeanScorer,
    Measure,
    Setup,
    Task,
    as_values,
    require_torchmetrics,
)


class _Scorer(MeanScorer):
    """Absolute errors, of which an image's numbers count alike."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        package = require_torchmetrics(REGRESSION.name)
        self.setup = setup
        self.mae, self.mse = package.MeanAbsoluteError(), package.MeanSquaredError()

    def add(self, result: Any, targets: Any) -> None:
        output = self.setup.output(result)
        if not isinstance(targets, Tensor):
            raise REGRESSION.misfit(f"a batch has {type(targets).__name__} in their place")
        given = targets.to(output.dtype)
        predicted, given = output.reshape(len(output), -1), given.reshape(len(given), -1)
        if predicted.shape != given.shape:
            raise REGRESSION.misfit(
                f"the targets {list(targets.shape)} of a batch are not as many as the outputs "
                f"{list(output.shape)}"
            )
        self.mae.update(predicted, given)
        self.mse.update(predicted, given)
        self.rows.append((predicted - given).abs().mean(1))

    def values(self) -> tuple[float | None, ...]:
        return float(self.mae.compute()), math.sqrt(float(self.mse.compute()))


def _accepts(target: Any) -> bool:
    return isinstance(target, int | float | Tensor)


def _fits(output: Tensor, target: Any) -> bool:
    count = target.numel() if isinstance(target, Tensor) else 1
    return target is None or math.prod(output.shape[1:]) == count


REGRESSION = Task(
    name="regression",
    measures=(Measure("MAE", lower_is_better=True), Measure("RMSE", lower_is_better=True)),
    targets="a number, or a tensor of as many as the network gives, for each image",
    accepts=_accepts,
    looks_for="an output of as many numbers as the target has",
    fits=_fits,
    read=as_values,
    scorer=_Scorer,
)
