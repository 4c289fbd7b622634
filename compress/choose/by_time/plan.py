"""Choosing by real time: layers timed, a plan made of them, whole networks timed to correct it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compress.choose.budgets import Budgets, options
from compress.choose.by_time.candidates import TimedBudgets, thinned, timed_candidates
from compress.choose.by_time.rounding import fastest_multiple
from compress.choose.by_time.search import first_choice, slowest_within
from compress.choose.by_time.sketch import narrowed, sketched
from compress.choose.by_time.widths import (
    Shares,
    TimedCosts,
    coarse_grid,
    rest_of_groups,
    timed_shares,
    touched,
)
from compress.choose.choices import problems
from compress.choose.chooser import Chooser
from compress.choose.overrides import Overrides
from compress.choose.widths import Widths
from compress.deploy.engines import Engine
from compress.errors import BudgetError
from compress.files import write_atomically
from compress.network.baseline import Network
from compress.plan import Candidate, Choice
from compress.rules.latency import BY_TIME
from compress.running.modules import cast
from compress.running.structure import expanded, placed
from compress.timing.layers import LatencyTable, LayerTimer, Setting
from compress.timing.networks import Timing, time_network_formats
from compress.timing.turns import Pace

# How thoroughly a network is timed in a trial: in many short turns, since the machine may do other
# work, and for no longer than that.
TRIAL = Pace(rounds=40, min_seconds=0.2, most_seconds=10.0)
# How long layers are timed in all, roughly, over all memory formats; of a layer with its candidates
# at least so long.
LAYERS_SECONDS, LAYER_SECONDS = 90.0, 0.3
# Many turns of few calls, of which the fastest counts: what a layer takes where nothing else runs.
ROUNDS, MIN_SECONDS = 24, 0.005
# What is tried of all widths at once, to see what else than layers becomes faster.
TRIED_WIDTH = 0.5
# How often the budget chooses anew where a choice loses more than predicted.
CHECKS = 3

# How much more than predicted the layers of a plan lose, where they do.
Check = Callable[[list[Choice]], Mapping[str, float]]


@dataclass(frozen=True)
class ByTime:
    """A budget of time.

    Attributes:
        fraction: Of the dense network's time.
        dtype: What the result will compute in.
        check: What compares predicted losses with measured ones; by default nothing does.
        engine: The runtime that everything is timed on.
    """

    fraction: float
    dtype: torch.dtype
    check: Check = lambda _: {}
    engine: Engine = Engine()


def choose_by_time(network: Network, chooser: Chooser, asked: ByTime) -> list[Choice]:
    """The choices of least predicted loss whose network, as measured, keeps ``--latency``.

    Args:
        network: The dense baseline.
        chooser: Its layers' statistics, the batch, overrides and schemes.
        asked: The budget.

    Raises:
        BudgetError: No choice is so fast; the message names what can be reached.
        InputError: The latency table cannot be read.
        ModelError: The runtime does not take the network.
    """
    config, fraction = chooser.config, asked.fraction
    path = Path(config.latency_table) if config.latency_table else None
    table = LatencyTable.read(path) if path is not None and path.exists() else LatencyTable()
    timer = _Timer(network, asked, config.latency_batch)
    candidates = _Candidates(chooser, timer, table)

    def within(*, narrow: bool) -> list[Choice]:
        budgets = candidates.budgets(f"best within latency {fraction:g}", narrow=narrow)
        if path is not None:
            write_atomically(path, table.to_json())
        return _within(budgets, timer, asked)

    if not config.narrows_last:
        return within(narrow=True)
    try:
        return within(narrow=False)
    except BudgetError:
        if chooser.narrower() is None:
            raise
        return within(narrow=True)


def _within(budgets: Sequence[TimedBudgets], timer: _Timer, asked: ByTime) -> list[Choice]:
    """Search the budgets of all memory formats, with widths alone where that fails.

    Raises:
        BudgetError: No choice is so fast.
    """
    fraction = asked.fraction
    budgets = promised(budgets, fraction, asked.check)
    try:
        return slowest_within(budgets, timer.ratio, fraction).choices
    except BudgetError:
        # Chains that seem faster by themselves may not be in the network. Channels that are gone
        # take no time anywhere.
        narrow = [u for u in (b.unfactored() for b in budgets) if u is not None]
        if not narrow:
            raise
        return slowest_within(narrow, timer.ratio, fraction).choices


def promised(budgets: Sequence[TimedBudgets], fraction: float, check: Check) -> list[TimedBudgets]:
    """Budgets whose choice, as predicted, loses what was predicted.

    Args:
        budgets: One for each memory format.
        fraction: What they are asked for.
        check: See `ByTime`.
    """
    budgets = list(budgets)
    for _ in range(CHECKS):
        found = check(first_choice(budgets, fraction))
        if not found:
            break
        budgets = [b.dearer(found) for b in budgets]
    return budgets


@dataclass(frozen=True)
class _Candidates:
    """What a budget of time chooses from, with its times.

    Attributes:
        chooser: The layers' statistics, overrides and schemes.
        timer: Times whole networks.
        table: Times of layers; filled.
    """

    chooser: Chooser
    timer: _Timer
    table: LatencyTable

    def budgets(self, why: str, *, narrow: bool) -> list[TimedBudgets]:
        """Timed candidates in every memory format that the network takes.

        Args:
            why: What is said of layers that stay as they are.
            narrow: Whether channels may be taken out.
        """
        chooser, timer = self.chooser, self.timer
        config, sites = chooser.config, chooser.sites
        timers = {form: timer.of_layers(self.table, form) for form in timer.totals}
        asked = overrides = Overrides(config, sites)
        if config.round_to is None:
            free = [site for site in sites if overrides.kept(site) is None]
            multiple = fastest_multiple(timer.dense, free, timers[timer.dense_format])
            overrides = Overrides(config.replace(round_to=multiple), sites)
        problem = problems(chooser.model, chooser.calibration, fitted=True)
        found = options(sites, overrides, problem, BY_TIME.size, chooser.track)
        found = {name: thinned(candidates) for name, candidates in found.items()}
        multiple = overrides.config.round_to or 1
        why += f" in ranks of {multiple}" if multiple > 1 else ""
        # Widths keep to what the user asks for alone: what steps they have is measured.
        widths = None
        if narrow:
            widths = chooser.widths(asked, found, TimedCosts({}, {}), coarse_grid)
        made = []
        for form, of_layers in timers.items():
            timed = self._timed(found, widths, of_layers)
            fixed = timer.totals[form] - sum(timed.dense[name] for name in timed.found)
            budgets = Budgets(
                sites, overrides, timed.found, BY_TIME, timer.totals[form], fixed, why,
                widths=timed.widths,
            )  # fmt: skip
            made.append(TimedBudgets(budgets, timed.dense, form))
        return made

    def _timed(
        self, found: Mapping[str, list[Candidate]], widths: Widths | None, timer: LayerTimer
    ) -> _Timed:
        """Candidates with times in one memory format, and what narrower layers take."""
        track, dense_model = self.chooser.track, self.timer.dense
        shares: dict[str, Shares] = {}
        seconds: dict[str, float] = {}
        count = len(found) + (len(touched(widths)) if widths else 0)
        each = LAYERS_SECONDS / (max(count, 1) * len(self.timer.totals))
        pace = Pace(ROUNDS, MIN_SECONDS, most_seconds=max(each, LAYER_SECONDS))
        if widths is not None:
            seconds, shares = timed_shares(dense_model, widths, (timer, pace), track)
        dense, timed = timed_candidates(
            dense_model, self.chooser.sites, found, (timer, pace), track
        )
        dense = {**seconds, **dense}
        total = self.timer.totals[timer.setting.memory_format]
        # Layers are timed by themselves, where what surrounds them may take longer than it does in
        # the network; they take no more than all of it.
        part = min(1.0, total / max(sum(dense.values()), 1e-12))
        dense = {name: part * s for name, s in dense.items()}
        timed = {
            name: [replace(c, seconds=part * (c.seconds or 0.0)) for c in candidates]
            for name, candidates in timed.items()
        }
        if widths is None:
            return _Timed(dense, timed, None)
        costs = TimedCosts(dense, shares)
        rest = self._rest(replace(widths, costs=costs), total - sum(dense.values()), timer)
        costs = replace(costs, rest=rest)
        return _Timed(dense, timed, replace(widths, found=timed, costs=costs))

    def _rest(self, widths: Widths, rest: float, timer: LayerTimer) -> dict[str, float]:
        """Seconds of what is none of the layers, by group: as a narrower network shows."""
        total = self.timer.totals[timer.setting.memory_format]
        pattern = {
            o.group.name: min(o.widths, key=lambda w: abs(w - TRIED_WIDTH * o.group.size))
            for o in widths.options
        }
        costs, then = widths.costs, widths.layer_widths(pattern)
        layers = sum(
            costs.dense(site, None) - costs.dense(site, then.get(site.name))
            for site in touched(widths)
        )
        ratio = self.timer.ratio_at(pattern, timer.setting.memory_format)
        parts = {o.group.name: pattern[o.group.name] / o.group.size for o in widths.options}
        return rest_of_groups(widths, rest, total * (1 - ratio) - layers, parts)


@dataclass(frozen=True)
class _Timed:
    """Candidates and layers with their seconds in one memory format.

    Attributes:
        dense: Of the layers as they are, by name.
        found: Candidates by layer.
        widths: What may become narrower; None where nothing may.
    """

    dense: dict[str, float]
    found: dict[str, list[Candidate]]
    widths: Widths | None


class _Timer:
    """Times whole networks of a plan's shape beside the dense one, without fitting them.

    Attributes:
        dense: The dense baseline in the dtype that it will run in.
        engine: The runtime.
        batch: Images a batch.
        totals: Its seconds a batch by memory format.
        dense_format: The one that it is fastest in.
    """

    def __init__(self, network: Network, asked: ByTime, batch: int) -> None:
        self.network, self.engine, self.batch = network, asked.engine, batch
        self.dtype = asked.dtype
        self.dense = cast(copy.deepcopy(network.model), asked.dtype)
        self.images = expanded(placed(network.example, network.device, dtype=asked.dtype), batch)
        self._dense_running = self.engine.network(self.dense, [self.images])
        # What seems fast enough is measured again, and is not built again for that.
        self._last: tuple[list[Choice], torch.nn.Module] | None = None
        formats = self.engine.formats(network.memory_formats)
        timings = self._time({}, formats)
        self.totals = {form: timings["dense", form].undisturbed for form in formats}
        self.dense_format = min(self.totals, key=lambda form: self.totals[form])

    def _time(
        self, beside: dict[str, torch.nn.Module], formats: tuple[str, ...]
    ) -> dict[tuple[str, str], Timing]:
        models = {"dense": self._dense_running, **beside}
        return time_network_formats(models, self.images, formats, TRIAL)

    def of_layers(self, table: LatencyTable, memory_format: str) -> LayerTimer:
        """How single layers are timed in a memory format, to be compared with these times."""
        device = next(self.dense.parameters()).device
        setting = Setting.here(device, self.dtype, memory_format, self.engine.described)
        return LayerTimer(table, setting, self.batch, self.engine.layer)

    def ratio(self, choices: list[Choice], memory_format: str) -> float:
        """Time of a plan's network in a memory format, over the dense one's at its best."""
        if self._last is None or self._last[0] != choices:
            self._last = None
            small = sketched(self.dense, self.network, choices)
            self._last = list(choices), self.engine.network(small, [self.images])
        return self._ratio(self._last[1], memory_format, self.dense_format)

    def ratio_at(self, widths: Mapping[str, int], memory_format: str) -> float:
        """Time of a network whose groups have some widths, over the dense one's in one format."""
        small = narrowed(self.dense, self.network, widths)
        running = self.engine.network(small, [self.images])
        return self._ratio(running, memory_format, memory_format)

    def _ratio(self, running: torch.nn.Module, memory_format: str, dense_format: str) -> float:
        formats = tuple(dict.fromkeys((memory_format, dense_format)))
        timings = self._time({"compressed": running}, formats)
        dense = timings["dense", dense_format].undisturbed
        return timings["compressed", memory_format].undisturbed / dense
