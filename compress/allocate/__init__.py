"""Choosing one candidate per layer under a global budget, and the rules that choose a rank alone.

Everything here is pure: numbers in, indices out.
"""

from compress.allocate.knapsack import UnreachableBudgetError, allocate, frontier
from compress.allocate.ranks import rank_by_energy, rank_by_threshold

__all__ = [
    "UnreachableBudgetError",
    "allocate",
    "frontier",
    "rank_by_energy",
    "rank_by_threshold",
]
