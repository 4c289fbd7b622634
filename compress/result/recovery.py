"""What a recovery came to, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RecoveryCheck:
    """One look at the held-out images: how far outputs are from the original's, per image."""

    step: int
    distance: float


@dataclass(frozen=True)
class Recovery:
    """How a compressed network learned from the original.

    ``images`` are those learned from, ``rate`` the size of a step relative to that of each weight,
    ``augmentation`` how pictures were changed (``"none"``, ``"pasted"``), ``features`` the modules
    whose outputs were compared beside the networks' own, ``precision`` what both computed in
    (``"full"``, ``"mixed"``), ``overparam`` the depth of the chains that factors were trained as.
    ``start`` and ``best`` are the held-out images' distances before it and of the network that was
    kept, after ``best_step`` steps. ``before`` is the end metric's value without it, on the test
    images. ``seconds`` are by what they were spent on: ``images``, ``original``, ``search``,
    ``all``.
    """

    images: int
    held_out_images: int
    steps: int
    batch_size: int
    rate: float
    augmentation: str
    start: float
    best: float
    best_step: int
    features: tuple[str, ...] = ()
    precision: str = "full"
    overparam: int = 0
    steps_back: int = 0
    before: float | None = None
    checks: tuple[RecoveryCheck, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
