"""Choosing a scheme and a rank for every layer: rules, overrides, break-even, budgets."""

from compress.choose.budgets import Budgets, candidates
from compress.choose.choices import break_even, scheme_cost
from compress.choose.edited import check_plan
from compress.choose.overrides import Overrides
from compress.choose.rules import make_plan

__all__ = [
    "Budgets",
    "Overrides",
    "break_even",
    "candidates",
    "check_plan",
    "make_plan",
    "scheme_cost",
]
