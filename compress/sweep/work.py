"""What the points of a sweep share, and what each of them takes: plan, fit, rewrite, judge."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch

from compress import __version__
from compress.calibrate.statistics import Calibration, without_unseen
from compress.choose import Budgets, make_plan
from compress.config import RunConfig
from compress.data import Split
from compress.errors import DataError
from compress.fit.layers import fit_plan
from compress.inputs.load import Inputs, batch_size_for
from compress.measure.cost import model_cost
from compress.network.baseline import Network, prepare
from compress.pipeline.run import calibrated
from compress.plan import Plan
from compress.progress import Track, silent
from compress.result import Cost, EndMetric, SweepPoint, SweepResult, Versions
from compress.sweep.evaluate import Judge, hold
from compress.sweep.grid import Grid
from compress.sweep.pick import Pick
from compress.sweep.store import PointStore

OnPoint = Callable[[SweepPoint, bool], None]


def ignore(point: SweepPoint, finished_before: bool) -> None:
    """Tell no one about a point."""
    del point, finished_before


class SweepWork:
    """What the points of one sweep share: network, statistics, candidates, the original's logits.

    Args:
        inputs: The network and its images.
        config: Settings, without a rank rule.
        grid: The points.
        test_points: Measure every point on the test set as well.
        store: Where finished points are kept, if anywhere.
        track: Progress.
    """

    def __init__(
        self,
        inputs: Inputs,
        config: RunConfig,
        grid: Grid,
        *,
        test_points: bool = True,
        store: PointStore | None = None,
        track: Track = silent,
    ) -> None:
        self.inputs, self.config, self.grid = inputs, config, grid
        self.store, self.track = store, track
        self.batch_size = batch_size_for(config, inputs.example)
        self.calibration_seconds: float | None = None
        original = self.network.original
        sets = {"validation": inputs.split.validation}
        if test_points and inputs.test is not None:
            sets["test"] = inputs.test
        if not len(sets["validation"]):
            raise DataError(
                "There are no validation images to measure points on: give at least two images "
                "with --data."
            )
        self.judges = {
            name: Judge(original, images, config, self.batch_size, name, track)
            for name, images in sets.items()
        }

    @cached_property
    def network(self) -> Network:
        """The dense baseline."""
        device = self.config.device
        return prepare(self.inputs.model.to(device), self.inputs.example.to(device))

    @cached_property
    def calibration(self) -> Calibration:
        """The statistics, taken once; kept in the store until the sweep is done."""
        # Under the rule of the grid, which decides what statistics are taken.
        config = self.grid.at(self.config, self.grid.values[0])
        if self.store is not None and not config.calibration:
            config = config.replace(calibration=str(self.store.calibration_file))
        known = bool(config.calibration) and Path(config.calibration).exists()
        start = time.perf_counter()
        schemes = config.schemes_in_play
        found = calibrated(self.network, self.inputs, config, schemes, self.batch_size, self.track)
        if not known:
            self.calibration_seconds = time.perf_counter() - start
        return found

    @cached_property
    def planner(self) -> Callable[[float], Plan]:
        """From a value of the rule to the plan that ``compress run`` would make."""
        network, calibration = without_unseen(self.network, self.calibration), self.calibration
        config, rule = self.config, self.grid.rule
        if rule not in ("macs", "params"):
            return lambda value: make_plan(
                network.model, network.sites, calibration, self.grid.at(config, value)
            )
        # The candidates do not depend on the budget, and they are what costs time.
        first = self.grid.at(config, self.grid.values[0])
        budgets = Budgets(network.model, network.sites, calibration, first)
        return lambda value: Plan(rule, value, config.metric, tuple(budgets.spend(value)))

    def points(self, on_point: OnPoint) -> list[SweepPoint]:
        """Measure every point that is not finished yet; return all in the grid's order.

        All plans are made before the first point is measured, so that a budget that cannot be
        reached stops the sweep while nothing is lost.
        """
        done: dict[float, SweepPoint] = {}
        for value in self.grid.values if self.store else ():
            assert self.store is not None
            point = self.store.read(self.grid.rule, value)
            if point is not None:
                done[value] = point
        plans = {v: self.planner(v) for v in self.grid.values if v not in done}
        for value in self.grid.values:
            if value in done:
                on_point(done[value], True)
                continue
            done[value] = self.measure(plans[value], value, list(done.values()))
            if self.store is not None:
                self.store.write(done[value])
            on_point(done[value], False)
        return pareto([done[v] for v in self.grid.values])

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
        for other in others:
            if (other.schemes, other.ranks) == (schemes, ranks):
                return dataclasses.replace(other, value=value, seconds=time.perf_counter() - start)
        config = self.grid.at(self.config, value)
        replaced = fit_plan(
            self.network,
            plan,
            self.calibration,
            config,
            self.inputs.split,
            self.batch_size,
            self.track,
        )
        model = replaced.model.to(self.inputs.dtype)
        cost = model_cost(model, self.network.example.to(next(model.parameters())))
        measured = {name: judge(model) for name, judge in self.judges.items()}
        return SweepPoint(
            rule=self.grid.rule,
            value=value,
            macs=cost.macs,
            params=cost.params,
            bytes=cost.bytes,
            ratio=cost.macs / max(self.folded.macs, 1),
            ranks=ranks,
            schemes=schemes,
            validation=measured["validation"],
            test=measured.get("test"),
            seconds=time.perf_counter() - start,
        )

    @cached_property
    def split(self) -> Split:
        """The images of the refit, held where memory allows it: every point reads them again."""
        split, workers = self.inputs.split, self.config.workers
        if not self.config.refit:
            return split
        fit = hold(split.fit, self.batch_size, workers)
        return Split(fit, self.judges["validation"].images, split.record)

    @cached_property
    def folded(self) -> Cost:
        """The cost of the dense baseline, what ratios are relative to."""
        size = torch.empty((), dtype=self.inputs.dtype).element_size()
        return model_cost(self.network.model, self.network.example, size)

    def result(self, points: list[SweepPoint], pick: Pick | None) -> SweepResult:
        """Put the points into a record with where they come from."""
        inputs, config = self.inputs, self.config
        return SweepResult(
            versions=Versions(__version__, torch.__version__, platform.python_version()),
            model=inputs.spec,
            points=tuple(points),
            config={k: v for k, v in dataclasses.asdict(config).items() if v is not None},
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
            warnings=(*inputs.warnings, *self.network.warnings, *warnings_of(points, inputs)),
        )


def pareto(points: list[SweepPoint]) -> list[SweepPoint]:
    """Mark the points that no other one beats: as few MACs and a better metric, or the reverse.

    The metric is that of the validation images; where it is unknown (no labels) the agreement
    with the original stands in for it.
    """
    quality = [_quality(p.validation) for p in points]

    def beaten(i: int) -> bool:
        return any(
            points[j].macs <= points[i].macs
            and quality[j] >= quality[i]
            and (points[j].macs, quality[j]) != (points[i].macs, quality[i])
            for j in range(len(points))
        )

    return [dataclasses.replace(p, pareto=not beaten(i)) for i, p in enumerate(points)]


def _quality(metric: EndMetric | None) -> float:
    if metric is None:
        return -math.inf
    if metric.custom is not None:
        return metric.custom.after
    found = metric.agreement if metric.top1_after is None else metric.top1_after
    return -math.inf if found is None else found


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
