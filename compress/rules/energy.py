"""``--energy``: keep the fewest eigenvalues that hold this share of their sum."""

from __future__ import annotations

from compress.plan import Choice
from compress.rules.record import (
    GridFlag,
    Planning,
    Rule,
    outside_unit_interval,
    remark_on_size,
)
from compress.rules.spectrum import rank_by_energy


def _choose(planning: Planning, value: float) -> list[Choice]:
    return planning.by_spectrum(lambda s: rank_by_energy(s, value), f"energy {value:g}")


ENERGY = Rule(
    name="energy",
    metavar="E",
    help="Keep the fewest eigenvalues that hold this share of their sum.",
    problem=outside_unit_interval,
    choose=_choose,
    weighs_layers=False,
    narrows=False,
    grid=GridFlag("--energies", "Shares of the eigenvalues' sum."),
    remark=remark_on_size("energy"),
)
