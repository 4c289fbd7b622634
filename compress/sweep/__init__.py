"""Sweeps: a grid of thresholds, energies or budgets evaluated on one calibration."""

from compress.sweep.grid import Grid, parse_grid
from compress.sweep.pick import Pick, parse_pick
from compress.sweep.run import Swept, sweep, sweep_network
from compress.sweep.work import Options

__all__ = ["Grid", "Options", "Pick", "Swept", "parse_grid", "parse_pick", "sweep", "sweep_network"]
