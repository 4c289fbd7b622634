"""Which point of a sweep to keep: conditions on what was measured on the validation images."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from compress.errors import ConfigError, near_matches
from compress.result import EndMetric, SweepPoint

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION = re.compile(r"\s*([a-z_0-9]+)\s*(<=|>=|<|>)\s*(\S+)\s*")


def _upper(metric: EndMetric) -> float | None:
    return metric.drop_interval.high if metric.drop_interval else None


def _accuracy(metric: EndMetric) -> float | None:
    return metric.custom.after if metric.custom else metric.top1_after


_OF_METRIC: dict[str, Callable[[EndMetric], float | None]] = {
    "drop": lambda m: m.drop,
    "drop_upper": _upper,
    "accuracy": _accuracy,
    "agreement": lambda m: m.agreement,
    "kl": lambda m: m.mean_kl,
}
_OF_POINT: dict[str, Callable[[SweepPoint], float | None]] = {
    "macs": lambda p: p.ratio,
}
QUANTITIES = (*_OF_METRIC, *_OF_POINT)
NEEDS_LABELS = ("drop", "drop_upper", "accuracy")


@dataclass(frozen=True)
class Condition:
    """One condition, such as ``drop <= 0.5``."""

    quantity: str
    symbol: str
    limit: float

    def value(self, point: SweepPoint) -> float | None:
        """What the point has of the quantity, None where it was not measured."""
        if self.quantity in _OF_POINT:
            return _OF_POINT[self.quantity](point)
        return _OF_METRIC[self.quantity](point.validation) if point.validation else None

    def holds(self, point: SweepPoint) -> bool:
        """Whether the point satisfies it; what was not measured does not."""
        value = self.value(point)
        return value is not None and _OPERATORS[self.symbol](value, self.limit)

    def excess(self, point: SweepPoint) -> float:
        """By how much the point misses it, 0 where it holds."""
        value = self.value(point)
        if value is None:
            return float("inf")
        return 0.0 if self.holds(point) else abs(value - self.limit)


@dataclass(frozen=True)
class Pick:
    """Conditions that the chosen point satisfies, all of them."""

    text: str
    conditions: tuple[Condition, ...]

    def choose(self, points: Iterable[SweepPoint]) -> int | None:
        """Return the index of the point with the fewest MACs that satisfies every condition.

        Only validation images are looked at. Of points with as many MACs the one with fewer
        parameters is taken, then the earlier.

        Returns:
            The index, or None where no point does.
        """
        fit = [
            (p.macs, p.params, i)
            for i, p in enumerate(points)
            if all(c.holds(p) for c in self.conditions)
        ]
        return min(fit)[2] if fit else None

    def nearest(self, points: Iterable[SweepPoint]) -> str:
        """Say which point misses the conditions by least, for an error message."""
        ranked = sorted(points, key=lambda p: sum(c.excess(p) for c in self.conditions))
        if not ranked:
            return "There is no point."
        best = ranked[0]
        values = [(c.quantity, c.value(best)) for c in self.conditions]
        shown = ", ".join(f"{q} {'not measured' if v is None else f'{v:.4g}'}" for q, v in values)
        return f"Nearest is {best.rule} {best.value:g} with {shown}."


def parse_pick(text: str) -> Pick:
    """Read conditions as the command line takes them: ``"drop<=0.5"``, ``"drop<=1, kl<0.02"``.

    The quantities are ``drop`` (points), ``drop_upper`` (upper end of its 95% interval),
    ``accuracy`` (a fraction, or the user's own metric), ``agreement`` (a fraction), ``kl`` (nats)
    and ``macs`` (the ratio to the folded original).

    Raises:
        ConfigError: No condition, an unknown quantity, or a limit that is not a number.
    """
    conditions = []
    for part in text.split(","):
        match = _CONDITION.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"--pick {text!r}: {part.strip()!r} is not a condition; write a quantity, <= or "
                f">=, and a number, such as drop<=0.5. The quantities are {', '.join(QUANTITIES)}."
            )
        quantity, symbol, limit = match.groups()
        if quantity not in QUANTITIES:
            raise ConfigError(
                f"--pick {text!r}: there is no quantity {quantity!r}."
                f"{near_matches(quantity, QUANTITIES)} "
                f"The quantities are {', '.join(QUANTITIES)}."
            )
        try:
            number = float(limit)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"--pick {text!r}: {limit!r} is not a number.")
        conditions.append(Condition(quantity, symbol, number))
    return Pick(text, tuple(conditions))
