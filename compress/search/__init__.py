"""Searches that measure whole networks: for a drop in accuracy, and for real time."""

from compress.search.drop import Found, cheapest_within_drop
from compress.search.latency import FoundTime, slowest_within

__all__ = ["Found", "FoundTime", "cheapest_within_drop", "slowest_within"]
