"""Choosing a scheme and a rank for every layer: rules, overrides, break-even, budgets."""

from compress.choose.budgets import Budgets, candidates, options
from compress.choose.by_time.candidates import TimedBudgets, thinned, timed_candidates
from compress.choose.by_time.rounding import fastest_multiple
from compress.choose.choices import break_even, problems, scheme_cost
from compress.choose.edited import check_plan
from compress.choose.overrides import Overrides
from compress.choose.rules import make_plan

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
