"""The plan as plain data: what happens to each layer and why, JSON both ways."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.errors import PlanError
from compress.untrusted import Unreadable, read_json, read_record

PLAN_FORMAT = 1
DENSE = "dense"
# No schemes of one layer: channels, or directions of them, are taken out of several at once.
NARROW = "narrow"
SLICE = "slice"
NARROWER = (NARROW, SLICE)


@dataclass(frozen=True)
class Candidate:
    """One way to treat one layer.

    Attributes:
        scheme: ``"dense"`` or the name of a scheme.
        ranks: Ranks per group; ``()`` for dense, two for ``two_sided``, else one.
        loss: Predicted increase of the objective per image, in the metric's units.
        macs: Multiply-accumulates per image, over all calls.
        params: Number of parameters, bias included.
        seconds: Measured time per batch, where latency is a cost.
    """

    scheme: str
    ranks: tuple[int, ...]
    loss: float
    macs: int
    params: int
    seconds: float | None = None


@dataclass(frozen=True)
class Choice:
    """What the plan does with one layer, and the reason for it.

    Attributes:
        name: The layer's qualified name.
        kind: Name of its type.
        shape: A short description; a plan for another model shows here.
        scheme: ``"dense"`` or the name of a scheme; may be edited.
        ranks: Ranks per group; may be edited.
        reason: How the choice came about.
        macs: Multiply-accumulates per image as chosen; ``dense_macs`` as it was.
        params: Parameters as chosen; ``dense_params`` as it was.
        break_even: Largest rank that still saves.
        full_rank: First rank at which the scheme loses nothing; of the weight matrix for dense.
        locked: Whether a dense layer must stay as it is, bit for bit, as where it was kept on
            request; else the refit may change its weights. May be edited.
        seconds: Measured time of a batch as chosen, where time was the cost; ``dense_seconds`` as
            it was.
        width: Inputs and outputs that stay where channels are taken out, else None; may be edited.
            The scheme is ``"narrow"`` or ``"slice"`` where nothing else happens to the layer.
    """

    name: str
    kind: str
    shape: str
    scheme: str
    ranks: tuple[int, ...]
    reason: str
    macs: int
    params: int
    dense_macs: int
    dense_params: int
    break_even: int
    full_rank: int
    locked: bool = False
    seconds: float | None = None
    dense_seconds: float | None = None
    width: tuple[int, int] | None = None

    @property
    def rewritten(self) -> bool:
        """Whether the layer is replaced."""
        return self.scheme != DENSE

    @property
    def factored(self) -> bool:
        """Whether it is replaced by a chain."""
        return self.scheme not in (DENSE, *NARROWER)


@dataclass(frozen=True)
class Plan:
    """Choices for every layer, in execution order, with the rule that made them.

    Attributes:
        slices: Whether channels that can be mixed are cut in directions; else by selection.
    """

    rule: str
    value: float | None
    metric: str
    choices: tuple[Choice, ...]
    model: str = ""
    source_sha256: str = ""
    calibration: str = ""
    slices: bool = True

    @property
    def ways(self) -> tuple[str, ...]:
        """How groups of channels are cut."""
        return NARROWER if self.slices else (NARROW,)

    def __getitem__(self, name: str) -> Choice:
        for choice in self.choices:
            if choice.name == name:
                return choice
        raise KeyError(name)

    def to_json(self) -> str:
        """Write the plan; `scheme`, `ranks` and `width` are what a user edits."""
        return json.dumps({"format": PLAN_FORMAT, **asdict(self)}, indent=2) + "\n"


def read_plan(path: str | Path) -> Plan:
    """Read a plan written by `Plan.to_json`, perhaps edited.

    Raises:
        PlanError: Not JSON, of a newer format, or with fields missing or of the wrong type.
    """
    try:
        raw: Any = read_json(path)
    except OSError as error:
        raise PlanError(f"The plan {path} cannot be read: {error.strerror}.") from error
    except Unreadable as error:
        raise PlanError(f"The plan {path} is not valid JSON: {error}.") from error
    if not isinstance(raw, dict) or "format" not in raw:
        raise PlanError(f"{path} is not a plan: it has no 'format' entry.")
    if raw.pop("format") != PLAN_FORMAT:
        raise PlanError(
            f"The plan {path} has a format this version does not read; update compress."
        )
    try:
        return read_record(Plan, raw, "the plan")
    except Unreadable as error:
        raise PlanError(f"The plan {path} is damaged: {error}.") from error
