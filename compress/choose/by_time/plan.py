"""Choosing by real time: layers timed, a plan made of them, whole networks timed to correct it."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from compress.choose.budgets import Budgets, options
from compress.choose.by_time.candidates import TimedBudgets, thinned, timed_candidates
from compress.choose.by_time.rounding import fastest_multiple
from compress.choose.by_time.search import slowest_within
from compress.choose.choices import problems
from compress.choose.chooser import Chooser
from compress.choose.overrides import Overrides
from compress.files import write_atomically
from compress.network.baseline import Network
from compress.network.chains import random_chain, replaced
from compress.plan import Choice
from compress.rules.latency import BY_TIME
from compress.running.structure import expanded, placed
from compress.timing.layers import LatencyTable, LayerTimer, Setting
from compress.timing.networks import Timing, time_network_formats
from compress.timing.turns import Pace

# Turns of each network in a trial, and how long each is timed in all at least.
ROUNDS = 7
MIN_SECONDS = 0.5


def choose_by_time(
    network: Network, chooser: Chooser, dtype: torch.dtype, fraction: float
) -> list[Choice]:
    """The choices of least predicted loss whose network, as measured, keeps ``--latency``.

    Args:
        network: The dense baseline.
        chooser: Its layers' statistics, the batch, overrides and schemes.
        dtype: What the result will compute in.
        fraction: The budget, of the dense network's time.

    Raises:
        BudgetError: No choice is so fast; the message names what can be reached.
        InputError: The latency table cannot be read.
    """
    config = chooser.config
    path = Path(config.latency_table) if config.latency_table else None
    table = LatencyTable.read(path) if path is not None and path.exists() else LatencyTable()
    timer = _Timer(network, dtype, config.latency_batch)
    budgets = _budgets(chooser, timer, table, f"best within latency {fraction:g}")
    if path is not None:
        write_atomically(path, table.to_json())
    return slowest_within(budgets, timer.ratio, fraction).choices


def _budgets(chooser: Chooser, timer: _Timer, table: LatencyTable, why: str) -> list[TimedBudgets]:
    """Timed candidates in every memory format that the network takes."""
    config, sites = chooser.config, chooser.sites
    timers = {form: timer.of_layers(table, form) for form in timer.totals}
    overrides = Overrides(config, sites)
    if config.round_to is None:
        free = [site for site in sites if overrides.kept(site) is None]
        multiple = fastest_multiple(timer.dense, free, timers[timer.dense_format])
        overrides = Overrides(config.replace(round_to=multiple), sites)
    problem = problems(chooser.model, chooser.calibration, fitted=True)
    found = options(sites, overrides, problem, BY_TIME.size, chooser.track)
    found = {name: thinned(candidates) for name, candidates in found.items()}
    multiple = overrides.config.round_to or 1
    why += f" in ranks of {multiple}" if multiple > 1 else ""
    made = []
    for form, of_layers in timers.items():
        dense, timed = timed_candidates(timer.dense, sites, found, of_layers, chooser.track)
        total = timer.totals[form]
        fixed = total - sum(dense.values())
        budgets = Budgets(sites, overrides, timed, BY_TIME, total, fixed, why)
        made.append(TimedBudgets(budgets, dense, form))
    return made


class _Timer:
    """Times whole networks of a plan's shape beside the dense one, without fitting them.

    Attributes:
        dense: The dense baseline in the dtype that it will run in.
        batch: Images a batch.
        totals: Its seconds a batch by memory format.
        dense_format: The one that it is fastest in.
    """

    def __init__(self, network: Network, dtype: torch.dtype, batch: int) -> None:
        self.sites = {site.name: site for site in network.sites}
        self.dense, self.dtype, self.batch = copy.deepcopy(network.model).to(dtype), dtype, batch
        self.images = expanded(placed(network.example, network.device, dtype=dtype), batch)
        timings = self._time({"dense": self.dense}, network.memory_formats)
        self.totals = {form: timings["dense", form].seconds for form in network.memory_formats}
        self.dense_format = min(self.totals, key=lambda form: self.totals[form])

    def _time(
        self, models: dict[str, torch.nn.Module], formats: tuple[str, ...]
    ) -> dict[tuple[str, str], Timing]:
        return time_network_formats(models, self.images, formats, Pace(ROUNDS, MIN_SECONDS))

    def of_layers(self, table: LatencyTable, memory_format: str) -> LayerTimer:
        """How single layers are timed in a memory format, to be compared with these times."""
        setting = Setting.here(self.images.device, self.dtype, memory_format)
        return LayerTimer(table, setting, self.batch)

    def ratio(self, choices: list[Choice], memory_format: str) -> float:
        """Time of a plan's network in a memory format, over the dense one's at its best."""
        modules = dict(self.dense.named_modules(remove_duplicate=False))
        chains = {
            c.name: random_chain(self.sites[c.name].geometry, c.scheme, c.ranks, modules[c.name])
            for c in choices
            if c.rewritten
        }
        small = replaced(self.dense, self.sites, chains)
        formats = tuple(dict.fromkeys((memory_format, self.dense_format)))
        timings = self._time({"dense": self.dense, "compressed": small}, formats)
        return (
            timings["compressed", memory_format].seconds
            / timings["dense", self.dense_format].seconds
        )
