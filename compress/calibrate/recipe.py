"""Which statistics a calibration takes, and how."""

from __future__ import annotations

from dataclasses import dataclass

from compress.calibrate.fisher import LossFunction
from compress.linalg.schemes import OUTPUT


@dataclass(frozen=True)
class Recipe:
    """Which statistics are taken, and how.

    Attributes:
        schemes: The schemes in play; they decide which layers' patches are accumulated.
        weigh: Whether to accumulate the weighting ``G``.
        pool: Whether to accumulate rows pooled by gradient too, which `fit_problem` then uses.
        loss: ``(output, labels) -> summed loss`` for outputs that are not logits.
        samples_per_dimension: Sample budget of a layer, in multiples of its row length.
        seed: Decides the random signs and positions.
    """

    schemes: tuple[str, ...] = (OUTPUT.name,)
    weigh: bool = True
    pool: bool = False
    loss: LossFunction | None = None
    samples_per_dimension: int = 64
    seed: int = 0
