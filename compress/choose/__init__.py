"""Choosing a scheme and a rank for every layer: rules, overrides, break-even, budgets."""

from compress.choose.budgets import Budgets, candidates, options
from compress.choose.choices import break_even, problems, scheme_cost
from compress.choose.edited import check_plan
from compress.choose.overrides import Overrides
from compress.choose.rounding import fastest_multiple
from compress.choose.rules import make_plan
from compress.choose.timed import TimedBudgets, thinned, timed_candidates

__all__ = [
    "Budgets",
    "Overrides",
    "TimedBudgets",
    "break_even",
    "candidates",
    "check_plan",
    "fastest_multiple",
    "make_plan",
    "options",
    "problems",
    "scheme_cost",
    "thinned",
    "timed_candidates",
]
