"""``--params``: a budget of parameters over all layers and schemes."""

from __future__ import annotations

from compress.rules.record import Currency, GridFlag, Rule, outside_unit_interval

BY_PARAMS = Currency(
    "params", lambda sized: sized.params, lambda candidate: candidate.params, "params"
)

PARAMS = Rule(
    name="params",
    metavar="F",
    help="Spend this fraction of the parameters.",
    problem=outside_unit_interval,
    choose=lambda planning, fraction: planning.within(BY_PARAMS, fraction),
    grid=GridFlag("--params", "Budgets: fractions of the parameters.", currency=BY_PARAMS),
)
