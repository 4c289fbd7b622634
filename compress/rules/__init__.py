"""The rank rules: what the user can ask for, one number each.

To add one, write its `Rule` in a file of its own and put it into `RULES`; its flag, its key in
configurations and its place in sweeps follow.
"""

from __future__ import annotations

from compress.rules.by_hand import BY_HAND
from compress.rules.energy import ENERGY
from compress.rules.latency import LATENCY
from compress.rules.macs import MACS
from compress.rules.params import PARAMS
from compress.rules.record import Currency, Outcome, Planning, RankOf, Rule, Sized
from compress.rules.target_drop import TARGET_DROP
from compress.rules.threshold import THRESHOLD

__all__ = [
    "BY_HAND",
    "DEFAULT_RULE",
    "GRID_RULES",
    "RULES",
    "RULE_NAMES",
    "Currency",
    "Outcome",
    "Planning",
    "RankOf",
    "Rule",
    "Sized",
    "rule_named",
]

RULES: tuple[Rule, ...] = (THRESHOLD, ENERGY, MACS, PARAMS, LATENCY, TARGET_DROP)
RULE_NAMES = tuple(rule.name for rule in RULES)
DEFAULT_RULE = next(rule for rule in RULES if rule.default is not None)
# Those that a sweep can walk along.
GRID_RULES = tuple(rule for rule in RULES if rule.grid is not None)


def rule_named(name: str) -> Rule | None:
    """Return the rule of a name, that of ranks by hand included; None where there is none."""
    return next((rule for rule in (*RULES, BY_HAND) if rule.name == name), None)
