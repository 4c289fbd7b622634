"""Ranks given by hand, with ``--rank`` and without a rule: every other layer is kept."""

from __future__ import annotations

from compress.rules.record import Rule

BY_HAND = Rule(
    name="rank",
    metavar="",
    help="",
    problem=lambda _: None,
    choose=lambda planning, _: planning.by_spectrum(None, ""),
    weighs_layers=False,
    narrows=False,
)
