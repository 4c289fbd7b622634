"""Which statistics a calibration takes, and how."""

from __future__ import annotations

from dataclasses import dataclass

from compress.linalg.schemes import OUTPUT
from compress.running.outputs import LossFunction, Reading


@dataclass(frozen=True)
class Recipe:
    """Which statistics are taken, and how.

    Attributes:
        schemes: The schemes in play; they decide which layers' patches are accumulated.
        weigh: Whether to accumulate the weighting ``G``.
        pool: Whether to accumulate rows pooled by gradient too, which `fit_problem` then uses.
        loss: ``(result, targets) -> summed loss`` of the user's own, in place of Fisher's.
        samples_per_dimension: Sample budget of a layer, in multiples of its row length.
        seed: Decides the random signs and positions.
        reading: What the network's outputs stand for; by default what the first ones look like.
        readers: Names of layers whose patches are accumulated whatever the schemes.
        in_place: Whether the forward changes values in place that gradients need.
    """

    schemes: tuple[str, ...] = (OUTPUT.name,)
    weigh: bool = True
    pool: bool = False
    loss: LossFunction | None = None
    samples_per_dimension: int = 64
    seed: int = 0
    reading: Reading | None = None
    readers: frozenset[str] = frozenset()
    in_place: bool = False
