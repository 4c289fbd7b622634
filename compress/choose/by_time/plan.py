"""Choosing by real time: layers timed, a plan made of them, whole networks timed to correct it."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from compress.calibrate.statistics import Calibration
from compress.choose import Overrides, options, problems
from compress.choose.by_time.candidates import TimedBudgets, thinned, timed_candidates
from compress.choose.by_time.rounding import fastest_multiple
from compress.choose.by_time.search import slowest_within
from compress.config import RunConfig
from compress.files import write_atomically
from compress.network.baseline import Network
from compress.network.chains import random_chain, replaced
from compress.plan import Choice, Plan
from compress.progress import Track
from compress.timing.layers import LatencyTable, Setting
from compress.timing.networks import Timing, time_network_formats

# Turns of each network in a trial, and how long each is timed in all at least.
ROUNDS = 7
MIN_SECONDS = 0.5


def timed_plan(
    network: Network,
    calibration: Calibration,
    config: RunConfig,
    dtype: torch.dtype,
    track: Track,
) -> Plan:
    """The plan of least predicted loss whose network, as measured, keeps ``--latency``.

    Args:
        network: The dense baseline.
        calibration: Its layers' statistics.
        config: The budget, the batch, overrides and schemes.
        dtype: What the result will compute in.
        track: Progress.

    Raises:
        BudgetError: No plan is so fast; the message names what can be reached.
        InputError: The latency table cannot be read.
    """
    path = Path(config.latency_table) if config.latency_table else None
    table = LatencyTable.read(path) if path is not None and path.exists() else LatencyTable()
    timer = _Timer(network, dtype, config.latency_batch)
    budgets = _budgets(network, calibration, config, timer, table, track)
    if path is not None:
        write_atomically(path, table.to_json())
    fraction = config.rule_value or 1.0
    found = slowest_within(budgets, timer.ratio, fraction)
    return Plan("latency", fraction, config.metric, tuple(found.choices))


def _budgets(
    network: Network,
    calibration: Calibration,
    config: RunConfig,
    timer: _Timer,
    table: LatencyTable,
    track: Track,
) -> list[TimedBudgets]:
    """Timed candidates in every memory format that the network takes."""
    device, sites = network.example.device, network.sites
    overrides = Overrides(config, sites)
    free = [site for site in sites if overrides.kept(site) is None]
    settings = {f: Setting.here(device, timer.dtype, f) for f in network.memory_formats}
    if config.round_to is None:
        multiple = fastest_multiple(
            timer.dense, free, table, settings[timer.dense_format], timer.batch
        )
        config = config.replace(round_to=multiple)
    problem = problems(network.model, calibration, fitted=True)
    found = options(sites, overrides, config, problem, "macs", track)
    found = {name: thinned(candidates) for name, candidates in found.items()}
    why = f"best within latency {config.rule_value:g}"
    if config.round_to and config.round_to > 1:
        why += f" in ranks of {config.round_to}"
    budgets = []
    for form, setting in settings.items():
        dense, timed = timed_candidates(
            timer.dense, sites, found, table, setting, timer.batch, track
        )
        budgets.append(TimedBudgets(sites, overrides, timed, dense, timer.totals[form], form, why))
    return budgets


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
        example = network.example.to(dtype)
        self.images = example.expand(batch, *example.shape[1:]).contiguous()
        timings = self._time({"dense": self.dense}, network.memory_formats)
        self.totals = {form: timings["dense", form].seconds for form in network.memory_formats}
        self.dense_format = min(self.totals, key=lambda form: self.totals[form])

    def _time(
        self, models: dict[str, torch.nn.Module], formats: tuple[str, ...]
    ) -> dict[tuple[str, str], Timing]:
        return time_network_formats(
            models, self.images, formats, rounds=ROUNDS, min_seconds=MIN_SECONDS
        )

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
