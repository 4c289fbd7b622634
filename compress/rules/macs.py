"""``--macs``: a budget of multiply-accumulates over all layers and schemes."""

from __future__ import annotations

from compress.rules.record import Currency, GridFlag, Rule, outside_unit_interval

BY_MACS = Currency("macs", lambda sized: sized.macs, lambda candidate: candidate.macs, "macs")

MACS = Rule(
    name="macs",
    metavar="F",
    help="Spend this fraction of the multiply-accumulates over all layers and schemes.",
    problem=outside_unit_interval,
    choose=lambda planning, fraction: planning.within(BY_MACS, fraction),
    grid=GridFlag("--macs", "Budgets: fractions of the MACs.", currency=BY_MACS),
)
