"""What a rank rule is: a number that the user gives, and how ranks follow from it.

Nothing here imports torch, so that the command line can name the rules without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from compress.plan import Candidate, Choice

# From a layer's eigenvalues to its rank.
RankOf = Callable[[Sequence[float]], int]


class Sized(Protocol):
    """Anything that costs multiply-accumulates and parameters: a layer, a scheme, a candidate."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image."""
        ...

    @property
    def params(self) -> int:
        """Parameters."""
        ...


@dataclass(frozen=True)
class Currency:
    """What a budget is counted in.

    Attributes:
        name: The rule it belongs to, as its flag is called.
        size: What a layer must have less of after a rewrite for that to be worth considering.
        cost: What a candidate takes out of the budget.
        saved: What is saved, for the reasons that a plan records.
    """

    name: str
    size: Callable[[Sized], int]
    cost: Callable[[Candidate], float]
    saved: str


class Planning(Protocol):
    """What a rule can choose by; each method gives one choice per layer."""

    def by_spectrum(self, rank_of: RankOf | None, rule: str) -> list[Choice]:
        """Give each layer the rank that its outputs' spectrum calls for.

        Args:
            rank_of: The rank of a spectrum; None keeps every layer without a rank by hand.
            rule: The rule and its value in words, for the reasons.
        """
        ...

    def within(self, currency: Currency, fraction: float) -> list[Choice]:
        """Spend a fraction of the dense network's cost where it matters most."""
        ...

    def within_time(self, fraction: float) -> list[Choice]:
        """Spend a fraction of the dense network's measured time."""
        ...

    def within_drop(self, points: float) -> list[Choice]:
        """Search for the cheapest network whose validation accuracy falls by at most ``points``."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What a rule came to, as far as a rule may have something to say about it.

    Attributes:
        value: The rule's value.
        macs: MACs over those of the dense network.
        batch: Images a batch at the largest batch that was timed; 0 where nothing was timed.
        time: Time of such a batch over the dense network's.
    """

    value: float
    macs: float
    batch: int = 0
    time: float = 0.0


@dataclass(frozen=True)
class GridFlag:
    """How a sweep walks along a rule.

    Attributes:
        flag: The flag that takes the values, such as ``--thresholds``.
        help: What the flag says.
        logarithmic: Whether the values of a range are spaced evenly in the logarithm.
        currency: What the budgets are counted in, where the points are budgets: their candidates
            are then made once.
    """

    flag: str
    help: str
    logarithmic: bool = False
    currency: Currency | None = None


@dataclass(frozen=True)
class Rule:
    """One way to choose ranks.

    Attributes:
        name: Its name in configurations, plans and reports; its flag is ``--name``.
        metavar: What the flag's value is called.
        help: What the flag says.
        problem: What is wrong with a value, to be read after ``name = value``; None where nothing.
        choose: From what can be chosen by and the value to a choice per layer.
        weighs_layers: Whether it weighs layers against each other, which takes statistics of whole
            weight gradients; a rule that looks at one spectrum at a time needs none.
        narrows: Whether it may take channels out of layers.
        narrows_last: Whether, where nobody says which schemes it may choose from, it does so only
            where ranks alone do not reach the budget.
        default: The value that holds where no rule is given; only one rule has it.
        grid: How a sweep walks along it; None where it holds a search or a clock.
        cuts_spectra_at_value: Whether the value is a height in the plots of spectra.
        remark: What the user should know about an outcome; None where nothing.
    """

    name: str
    metavar: str
    help: str
    problem: Callable[[float], str | None]
    choose: Callable[[Planning, float], list[Choice]]
    weighs_layers: bool = True
    narrows: bool = True
    narrows_last: bool = False
    default: float | None = None
    grid: GridFlag | None = None
    cuts_spectra_at_value: bool = False
    remark: Callable[[Outcome], str | None] = lambda _: None

    @property
    def flag(self) -> str:
        """Its flag on the command line."""
        return "--" + self.name.replace("_", "-")


def outside_unit_interval(value: float) -> str | None:
    """Say that a fraction is outside (0, 1], or None where it is inside."""
    return None if 0 < value <= 1 else "is outside (0, 1]"


def remark_on_size(name: str) -> Callable[[Outcome], str | None]:
    """Return what says that a rule by spectra left nearly everything."""

    def remark(outcome: Outcome) -> str | None:
        if outcome.macs <= 0.95:
            return None
        return (
            f"The {name} rule left {100 * outcome.macs:.1f}% of the MACs. To set a size instead, "
            "pass --macs 0.5 or --params 0.5."
        )

    return remark
