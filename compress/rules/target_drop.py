"""``--target-drop``: the cheapest network that loses at most so many points of accuracy."""

from __future__ import annotations

from compress.rules.record import Rule


def _problem(value: float) -> str | None:
    return None if 0 <= value <= 100 else "is not a number of points from 0 to 100"


TARGET_DROP = Rule(
    name="target_drop",
    metavar="P",
    help="Search for the cheapest model whose validation accuracy falls by at most P points.",
    problem=_problem,
    choose=lambda planning, points: planning.within_drop(points),
)
