"""What a network gives after each further layer is replaced, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProgressivePoint:
    """The network with its first layers replaced.

    Attributes:
        layer: The layer that was replaced last; empty where none is yet, and where it is the whole
            network.
        value: What the network is measured by; None where that is not defined.
    """

    layer: str
    value: float | None = None


@dataclass(frozen=True)
class Progressive:
    """What a network gives after each further layer is replaced, in the order of the forward.

    Attributes:
        metric: What it is measured by.
        unit: ``"fraction"``, shown as percent with changes in points; ``"dB"``; or empty.
        lower_is_better: Whether a smaller value is the better one.
        set: ``"test"`` or ``"validation"``.
        images: How many images of that set.
        points: The first with no layer replaced, then one for each layer.
    """

    metric: str
    unit: str = ""
    lower_is_better: bool = False
    set: str = ""
    images: int = 0
    points: tuple[ProgressivePoint, ...] = ()
