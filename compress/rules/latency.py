"""``--latency``: a budget of time, as measured on the device at hand."""

from __future__ import annotations

from compress.rules.record import Currency, Outcome, Rule, outside_unit_interval

# A rewrite that saves no MACs is not worth timing.
BY_TIME = Currency(
    "latency", lambda sized: sized.macs, lambda candidate: candidate.seconds or 0.0, "time"
)


def _remark(outcome: Outcome) -> str | None:
    if not outcome.batch or outcome.time <= outcome.value:
        return None
    return (
        f"Measured again after the fit, a batch of {outcome.batch} takes {outcome.time:.3f} of the "
        f"dense network's time, over the budget of {outcome.value:g}: the machine does other work, "
        "or its speed drifts. Run again on a quiet machine, or with a smaller budget."
    )


LATENCY = Rule(
    name="latency",
    metavar="F",
    help="Spend this fraction of the dense network's time, as measured on this device at "
    "--latency-batch.",
    problem=outside_unit_interval,
    choose=lambda planning, fraction: planning.within_time(fraction),
    remark=_remark,
    # What is predicted of widths by time is coarser than what is predicted of ranks: tried on
    # networks that reach the budget by ranks alone, it cost more accuracy.
    narrows_last=True,
)
