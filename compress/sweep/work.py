"""What the points of a sweep share, and what each of them takes: plan, fit, rewrite, judge."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from compress.calibrate.statistics import Calibration, without_unseen
from compress.choose import Chooser
from compress.config import RunConfig
from compress.errors import DataError
from compress.inputs.load import Inputs
from compress.measure.cost import model_cost
from compress.measure.quality import quality, unbeaten
from compress.network.baseline import Network, check_runs_in
from compress.pipeline.job import Job
from compress.pipeline.outcome import current_versions
from compress.pipeline.promised import PromisedBudgets
from compress.plan import Plan
from compress.progress import Track, silent
from compress.result import Cost, Deployed, SweepPoint, SweepResult
from compress.running.modules import cast
from compress.running.structure import like_weights
from compress.sweep.deployed import Deployer, runtime_of, with_fronts
from compress.sweep.evaluate import Judge
from compress.sweep.grid import Grid
from compress.sweep.pick import Pick
from compress.sweep.store import PointStore

OnPoint = Callable[[SweepPoint], None]


def ignore(point: SweepPoint) -> None:
    """Tell no one about a point."""
    del point


@dataclass(frozen=True)
class Options:
    """How a sweep is done.

    Attributes:
        test_points: Measure every point on the test set, and not only the chosen one.
        track: Progress.
        on_point: Called with each point as it is measured.
        on_known: Called with each point that was finished before.
        int8: Also compare files in float and in eight bits; see `compress.sweep.deployed`.
    """

    test_points: bool = True
    track: Track = silent
    on_point: OnPoint = ignore
    on_known: OnPoint = ignore
    int8: bool = False


class SweepWork:
    """What the points of a sweep share: network, statistics, candidates, original results.

    Args:
        inputs: The network and its images.
        config: Settings; a rank rule of its own does not count.
        grid: The points.
        options: How the sweep is done.
        store: Where finished points are kept, if anywhere.
    """

    def __init__(
        self,
        inputs: Inputs,
        config: RunConfig,
        grid: Grid,
        options: Options = Options(),
        store: PointStore | None = None,
    ) -> None:
        self.inputs, self.config, self.grid = inputs, config, grid
        self.options, self.store = options, store
        self.calibration_seconds: float | None = None
        self.deployed: tuple[Deployed, ...] = ()
        if not len(inputs.split.validation):
            raise DataError(
                "There are no validation images to measure points on: give at least two images "
                "with --data."
            )

    @cached_property
    def prepared(self) -> Job:
        """The dense baseline."""
        # Under the rule of the grid, which decides what statistics are taken.
        config = self.grid.at(self.config, self.grid.values[0])
        if self.store is not None and not config.calibration:
            config = config.replace(calibration=str(self.store.calibration_file))
        job = Job.open(self.inputs, config, self.options.track)
        check_runs_in(job.network.original, job.network.example, self.inputs.dtype)
        return job

    @cached_property
    def job(self) -> Job:
        """The same with its images, which are decoded once for all points."""
        return self.prepared.with_images()

    @property
    def so_far(self) -> Job:
        """What is known so far; no image is read for it."""
        return self.job if "job" in self.__dict__ else self.prepared

    @property
    def network(self) -> Network:
        """The dense baseline, with what is known of it so far."""
        return self.so_far.network

    @cached_property
    def judges(self) -> dict[str, Judge]:
        """What compares points with the original, by set of images."""
        inputs, original = self.job.inputs, self.network.original
        sets = {"validation": inputs.split.validation}
        if self.options.test_points and inputs.test is not None:
            sets["test"] = inputs.test
        test = self.job.yardstick
        by = {"validation": dataclasses.replace(test, labels_fit=False), "test": test}
        return {name: Judge(original, of, by[name], name) for name, of in sets.items()}

    @cached_property
    def calibration(self) -> Calibration:
        """The statistics, taken once; kept in the store until the sweep is done."""
        config = self.prepared.config
        known = bool(config.calibration) and Path(config.calibration).exists()
        start = time.perf_counter()
        found = self.job.calibrate(config.schemes_in_play)
        if not known:
            self.calibration_seconds = time.perf_counter() - start
        return found

    @cached_property
    def planner(self) -> Callable[[float], Plan]:
        """From a value of the rule to the plan that ``compress run`` would make."""
        network, calibration = without_unseen(self.job.network, self.calibration), self.calibration
        rule, currency = self.grid.rule, self.grid.currency

        def chooser(config: RunConfig) -> Chooser:
            return Chooser.of(network, calibration, config)

        if currency is None:
            return lambda value: chooser(self.grid.at(self.job.config, value)).plan()
        # The candidates do not depend on the budget, and they are what costs time.
        budgets = chooser(self.job.config).budgets(currency)
        metric, slices = self.job.config.metric, self.config.slices
        job = dataclasses.replace(self.job, network=network)

        def plan(value: float) -> Plan:
            # Each point begins with what was predicted, as a run does.
            choices = PromisedBudgets(job, calibration, budgets).spend(value)
            return Plan(rule, value, metric, tuple(choices), slices=slices)

        return plan

    def points(self) -> list[SweepPoint]:
        """Measure every point that is not finished yet; return all in the grid's order.

        All plans are made before the first point is measured, so that a budget that cannot be
        reached stops the sweep while nothing is lost.
        """
        deployer = self.deployer  # which finds out first whether the dense network has files
        if deployer is not None:
            self.deployed = deployer.of_dense()
        done = self._known()
        plans = {v: self.planner(v) for v in self.grid.values if v not in done}
        for value in self.grid.values:
            if value in done:
                self.options.on_known(done[value])
                continue
            done[value] = self.measure(plans[value], value, list(done.values()))
            if self.store is not None:
                self.store.write(done[value])
            self.options.on_point(done[value])
        points = pareto([done[v] for v in self.grid.values])
        self.deployed, points = with_fronts(self.deployed, points)
        return points

    def _known(self) -> dict[float, SweepPoint]:
        if self.store is None:
            return {}
        found = {value: self.store.read(self.grid.rule, value) for value in self.grid.values}
        return {value: point for value, point in found.items() if point is not None}

    def measure(self, plan: Plan, value: float, others: list[SweepPoint]) -> SweepPoint:
        """Fit, rewrite and judge one point; a point that comes to the same network is copied.

        Args:
            plan: What to do.
            value: The rule's value.
            others: Points measured already.
        """
        start = time.perf_counter()
        schemes = {c.name: c.scheme for c in plan.choices}
        ranks = {c.name: c.ranks for c in plan.choices if c.rewritten}
        widths = {c.name: c.width for c in plan.choices if c.width is not None}
        for other in others:
            if (other.schemes, other.ranks, other.widths) == (schemes, ranks, widths):
                return dataclasses.replace(other, value=value, seconds=time.perf_counter() - start)
        replaced = self.job.fitter.carry_out(plan, self.calibration)
        model = cast(replaced.model, self.inputs.dtype)
        cost = model_cost(model, like_weights(self.network.example, next(model.parameters())))
        measured = {name: judge(model) for name, judge in self.judges.items()}
        chains = [choice.name for choice in plan.choices if choice.factored]
        deployer = self.deployer
        files = () if deployer is None else deployer.of_point(model, chains, measured)
        return SweepPoint(
            rule=self.grid.rule,
            value=value,
            macs=cost.macs,
            params=cost.params,
            bytes=cost.bytes,
            ratio=cost.macs / max(self.folded.macs, 1),
            ranks=ranks,
            schemes=schemes,
            widths=widths,
            validation=measured["validation"],
            test=measured.get("test"),
            seconds=time.perf_counter() - start,
            deployed=files,
        )

    @cached_property
    def deployer(self) -> Deployer | None:
        """What makes files of networks; None where they are not asked for."""
        if not self.options.int8:
            return None
        return Deployer(self.job, self.judges, runtime_of(self.config))

    @cached_property
    def folded(self) -> Cost:
        """The cost of the dense baseline, what ratios are relative to."""
        size = torch.empty((), dtype=self.inputs.dtype).element_size()
        return model_cost(self.network.model, self.network.example, size)

    def result(self, points: list[SweepPoint], pick: Pick | None) -> SweepResult:
        """Put the points into a record with where they come from."""
        inputs, config = self.inputs, self.config
        return SweepResult(
            versions=current_versions(),
            model=inputs.spec,
            points=tuple(points),
            config=config.settings(),
            source=inputs.source,
            source_sha256=inputs.sha256,
            model_fingerprint=inputs.sha256,
            data_fingerprint=inputs.split.fit.fingerprint,
            test_fingerprint="" if inputs.test is None else inputs.test.fingerprint,
            folded_cost=self.folded,
            layers=tuple(site.name for site in self.network.sites),
            pick=pick.text if pick else "",
            calibration_images=len(inputs.split.fit),
            calibration_seconds=self.calibration_seconds,
            warnings=(
                *inputs.warnings,
                *self.network.warnings,
                *self.so_far.unread,
                *warnings_of(points, inputs),
            ),
            deployed=self.deployed,
            deployed_on=runtime_of(config) if self.options.int8 else "",
            deployed_batch=config.latency_batch if self.options.int8 else None,
        )


def pareto(points: list[SweepPoint]) -> list[SweepPoint]:
    """Mark the points that no other one beats: as few MACs and a better metric, or the reverse.

    The metric is that of the validation images; where it is unknown (no labels) the agreement
    with the original stands in for it.
    """
    front = unbeaten([(p.macs, quality(p.validation)) for p in points])
    return [dataclasses.replace(p, pareto=best) for p, best in zip(points, front, strict=True)]


def warnings_of(points: list[SweepPoint], inputs: Inputs) -> tuple[str, ...]:
    """What the user should know about a sweep as a whole."""
    found = []
    if len(points) == 1:
        found.append("A sweep of one point shows no trade-off; give more values.")
    if points and points[0].validation is not None and points[0].validation.near_chance:
        found.append(
            "The original is hardly better than chance on the validation images; check the order "
            "of the classes (--class-map) and the normalisation (--mean, --std)."
        )
    if points and not any(p.ranks for p in points):
        found.append(
            "No point rewrites any layer: every rank is beyond break-even. Try higher thresholds, "
            "or a budget such as --macs 0.8,0.5."
        )
    if inputs.test is None:
        found.append("Unverified: no test set was given (--test).")
    return tuple(found)
