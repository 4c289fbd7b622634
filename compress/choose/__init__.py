"""Choosing a scheme and a rank for every layer: rules, overrides, break-even, budgets."""

from compress.choose.budgets import Budgets, candidates, options
from compress.choose.choices import break_even, problems, scheme_cost
from compress.choose.chooser import Chooser
from compress.choose.edited import check_plan
from compress.choose.overrides import Latitude, Overrides

__all__ = [
    "Budgets",
    "Chooser",
    "Latitude",
    "Overrides",
    "break_even",
    "candidates",
    "check_plan",
    "options",
    "problems",
    "scheme_cost",
]
