"""The rules that choose the rank of one layer using only its spectrum."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from compress.errors import CalibrationError


def rank_by_threshold(eigenvalues: Sequence[float], threshold: float, *, floor: float = 0.0) -> int:
    """Count the eigenvalues of at least ``threshold`` times the largest; never less than one.

    Args:
        eigenvalues: Of a covariance, in any order. Negative ones are rounding and count as zero.
        threshold: In [0, 1]; zero keeps every eigenvalue.
        floor: A largest eigenvalue at or below this is numerically zero, and the rank one. Give
            the machine epsilon times the mean square of what was measured.

    Raises:
        CalibrationError: An eigenvalue is not finite.
        ValueError: No eigenvalues, or a threshold outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold = {threshold} is outside [0, 1]")
    values = _descending(eigenvalues)
    if values[0] <= max(floor, 0.0):
        return 1
    return sum(value >= threshold * values[0] for value in values)


def rank_by_energy(eigenvalues: Sequence[float], energy: float, *, floor: float = 0.0) -> int:
    """Return the smallest rank whose eigenvalues sum to at least ``energy`` of the total.

    The sum is compared by what is left out, up to the rounding of the total, so that ``energy = 1``
    keeps what carries energy and no more. Never less than one.

    Args:
        eigenvalues: Of a covariance, in any order. Negative ones are rounding and count as zero.
        energy: In [0, 1].
        floor: A largest eigenvalue at or below this is numerically zero, and the rank one.

    Raises:
        CalibrationError: An eigenvalue is not finite.
        ValueError: No eigenvalues, or an energy outside [0, 1].
    """
    if not 0 <= energy <= 1:
        raise ValueError(f"energy = {energy} is outside [0, 1]")
    values = _descending(eigenvalues)
    if values[0] <= max(floor, 0.0):
        return 1
    total = math.fsum(values)
    allowed = (1 - energy) * total + len(values) * sys.float_info.epsilon * total
    rank, left_out = len(values), 0.0
    while rank > 1 and left_out + values[rank - 1] <= allowed:
        rank -= 1
        left_out += values[rank]
    return rank


def _descending(eigenvalues: Sequence[float]) -> list[float]:
    values = [float(value) for value in eigenvalues]
    if not values:
        raise ValueError("a rank needs at least one eigenvalue")
    if not all(map(math.isfinite, values)):
        raise CalibrationError(
            "A spectrum holds an eigenvalue that is not finite; the statistics it came from are "
            "damaged. Calibrate again."
        )
    return sorted((max(value, 0.0) for value in values), reverse=True)
