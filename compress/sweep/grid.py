"""The grid of a sweep: one rule and the values it takes, written as a range or a list."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compress.config import RunConfig
from compress.errors import ConfigError
from compress.rules import GRID_RULES, Currency
from compress.rules.record import GridFlag

_FORMS = "a list such as 0.9,0.8,0.65 or a range such as 1e-4:1e-1:9 (first:last:count)"
LARGEST_GRID = 10_000


@dataclass(frozen=True)
class Grid:
    """The points of a sweep.

    Attributes:
        rule: The name of a rule that a sweep can walk along; not one with a search or a clock
            inside.
        values: The rule's value at each point, in the order given, none twice.

    Raises:
        ConfigError: The rule is not a grid's, there is no value, or one is out of the rule's range.
    """

    rule: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        flag = _flag(self.rule).flag
        if not self.values:
            raise ConfigError(f"The grid of {flag} is empty; give {_FORMS}.")
        object.__setattr__(self, "values", tuple(dict.fromkeys(self.values)))
        for value in self.values:
            if not math.isfinite(value):
                raise ConfigError(f"{flag} holds {value}, which is not a finite number.")
            self.at(RunConfig(), value)

    @property
    def currency(self) -> Currency | None:
        """What the points are budgets of, if they are budgets."""
        return _flag(self.rule).currency

    def at(self, config: RunConfig, value: float) -> RunConfig:
        """Return the configuration of one point: this rule at a value, and no other rule.

        Raises:
            ConfigError: The value is out of the rule's range.
        """
        return config.with_rule(self.rule, value)

    def __str__(self) -> str:
        return f"{_flag(self.rule).flag} {','.join(f'{v:g}' for v in self.values)}"


def _flag(rule: str) -> GridFlag:
    """How a sweep walks along a rule.

    Raises:
        ConfigError: It cannot.
    """
    for known in GRID_RULES:
        if known.name == rule and known.grid is not None:
            return known.grid
    names = ", ".join(known.name for known in GRID_RULES)
    raise ConfigError(f"A sweep cannot walk along {rule!r}; it takes {names}.")


def parse_grid(rule: str, text: str) -> Grid:
    """Read a grid as the command line takes it.

    Args:
        rule: The rule to walk along.
        text: Values with commas between them, or ``first:last:count``, both ends included; the
            values of a range of thresholds are spaced evenly in the logarithm, others evenly.

    Raises:
        ConfigError: Nothing there, not a number, a count that is not a positive whole number, or
            values out of the rule's range.
    """
    grid = _flag(rule)
    flag = grid.flag
    parts = text.split(":")
    if len(parts) == 1:
        return Grid(rule, tuple(_number(p, flag, text) for p in text.split(",") if p.strip()))
    if len(parts) != 3:
        raise ConfigError(f"{flag} {text!r} is not a grid; give {_FORMS}.")
    first, last = (_number(part, flag, text) for part in parts[:2])
    count = parts[2].strip()
    if not count.isdecimal() or not 1 <= int(count) <= LARGEST_GRID:
        raise ConfigError(
            f"{flag} {text!r}: the count {parts[2]!r} is not a whole number from 1 to "
            f"{LARGEST_GRID}; give {_FORMS}."
        )
    if grid.logarithmic and min(first, last) <= 0:
        raise ConfigError(
            f"{flag} {text!r}: a range of thresholds is spaced in the logarithm, so both ends "
            "must be above 0; list the values to include 0."
        )
    return Grid(rule, tuple(_spaced(first, last, int(count), logarithmic=grid.logarithmic)))


def _spaced(first: float, last: float, count: int, *, logarithmic: bool) -> list[float]:
    if count == 1:
        return [first]
    shares = [i / (count - 1) for i in range(1, count - 1)]
    if logarithmic:
        # Four digits are plenty for a step on a grid, and they can be read and typed again.
        inner = [float(f"{first * (last / first) ** share:.4g}") for share in shares]
    else:
        inner = [float(f"{first + (last - first) * share:.12g}") for share in shares]
    return [first, *inner, last]


def _number(part: str, flag: str, text: str) -> float:
    try:
        return float(part)
    except ValueError as error:
        raise ConfigError(
            f"{flag} {text!r}: {part.strip()!r} is not a number; give {_FORMS}."
        ) from error
