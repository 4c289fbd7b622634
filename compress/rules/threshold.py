"""``--threshold``: keep the eigenvalues of at least this part of the largest."""

from __future__ import annotations

from compress.plan import Choice
from compress.rules.record import GridFlag, Planning, Rule, remark_on_size
from compress.rules.spectrum import rank_by_threshold


def _choose(planning: Planning, value: float) -> list[Choice]:
    return planning.by_spectrum(lambda s: rank_by_threshold(s, value), f"threshold {value:g}")


THRESHOLD = Rule(
    name="threshold",
    metavar="T",
    help="Keep eigenvalues of at least T times the largest (the default rule, 1e-3).",
    problem=lambda value: None if 0 <= value < 1 else "is outside [0, 1)",
    choose=_choose,
    weighs_layers=False,
    narrows=False,
    default=1e-3,
    grid=GridFlag(
        "--thresholds",
        "Thresholds: a list such as 1e-3,1e-2, or first:last:count, evenly in the logarithm.",
        logarithmic=True,
    ),
    cuts_spectra_at_value=True,
    remark=remark_on_size("threshold"),
)
