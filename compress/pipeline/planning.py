"""Choosing a plan with everything at hand: statistics, images, and a clock."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from compress.calibrate.statistics import Calibration
from compress.choose import Chooser
from compress.choose.by_time.plan import ByTime, choose_by_time
from compress.deploy.engines import engine_named
from compress.pipeline.job import Job
from compress.pipeline.promised import PromisedBudgets, check_of
from compress.pipeline.target_drop import choose_within_drop
from compress.plan import Choice, Plan
from compress.rules import Currency, RankOf


@dataclass(frozen=True)
class Planner:
    """What every rule can choose by; a `compress.rules.Planning`.

    Attributes:
        job: The network and its images.
        chooser: Its layers' statistics.
    """

    job: Job
    chooser: Chooser

    def by_spectrum(self, rank_of: RankOf | None, rule: str) -> list[Choice]:
        """Give each layer the rank that its spectrum calls for."""
        return self.chooser.by_spectrum(rank_of, rule)

    def within(self, currency: Currency, fraction: float) -> list[Choice]:
        """Spend a fraction of the dense network's cost."""
        budgets = self.chooser.budgets(currency)
        return PromisedBudgets(self.job, self.chooser.calibration, budgets).spend(fraction)

    def within_time(self, fraction: float) -> list[Choice]:
        """Spend a fraction of the dense network's measured time."""
        job = self.job
        check = check_of(job, self.chooser.calibration)
        engine = engine_named(job.config.runtime, job.config.device)
        asked = ByTime(fraction, job.inputs.dtype, check, engine)
        return choose_by_time(job.network, self.chooser, asked)

    def within_drop(self, points: float) -> list[Choice]:
        """Search for the cheapest network whose validation accuracy falls by at most ``points``."""
        return choose_within_drop(self.job, self.chooser, points)


def choose(job: Job, calibration: Calibration) -> Plan:
    """Choose a plan by the configuration's rule.

    Raises:
        BudgetError: The budget cannot be reached; the smallest reachable fraction is named.
        ConfigError: Overrides that fit no layer.
        DataError: The rule measures accuracy, and there are no labelled validation images.
    """
    config, network = job.config, job.network
    chooser = Chooser.of(network, calibration, config, job.track)
    choices = config.chosen_rule.choose(Planner(job, chooser), config.rule_value or 0.0)
    plan = Plan(config.rule, config.rule_value, config.metric, tuple(choices))
    return dataclasses.replace(
        plan,
        slices=config.slices,
        model=job.inputs.spec,
        source_sha256=job.inputs.sha256,
        calibration=calibration.source.data,
    )
