"""Real time, as measured: layers and whole networks, side by side.

A machine's speed drifts by more than the differences that matter here, so nothing is ever timed
alone: candidates take turns within one run, the order rotating. Networks that are reported are
judged by the median of their turns; what a choice is made by, by the fastest turns, which what else
the machine does delays least. `LatencyTable` remembers what a layer took, so that a shape which
occurs in several layers is measured once; the times of one call to `LatencyTable.time` are the ones
to compare.
"""

from compress.running.memory_format import MEMORY_FORMATS, in_memory_format, put_in_format
from compress.timing.layers import LatencyKey, LatencyTable, LayerTimer, Setting, describe_layer
from compress.timing.networks import Timing, time_network, time_network_formats
from compress.timing.turns import Pace, measure

__all__ = [
    "MEMORY_FORMATS",
    "LatencyKey",
    "LatencyTable",
    "LayerTimer",
    "Pace",
    "Setting",
    "Timing",
    "describe_layer",
    "in_memory_format",
    "measure",
    "put_in_format",
    "time_network",
    "time_network_formats",
]
