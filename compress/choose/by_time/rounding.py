"""Which multiples of ranks this device is fast at, as measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from torch import nn

from compress.choose.choices import break_even
from compress.linalg.schemes import OUTPUT
from compress.network.chains import random_chain
from compress.network.sites import LayerSite
from compress.timing.layers import LayerTimer
from compress.timing.turns import Pace

# Tried from the largest. Rounding up is worth it while it costs less than this.
MULTIPLES = (16, 8, 4)
FREE = 1.03
# The layers that are asked: those with most MACs.
LAYERS = 3
MIN_SECONDS = 0.1


def fastest_multiple(
    model: nn.Module,
    sites: Iterable[LayerSite],
    timer: LayerTimer,
) -> int:
    """The largest multiple that ranks may be rounded up to for nothing.

    Vector units and blocked kernels compute some ranks more than asked for, so that a rank costs
    what the next multiple does. A multiple ``m`` is free if a rank of ``16 n`` takes no longer
    than ``16 n - m + 1``, at the median of the layers with most MACs.

    Args:
        model: The dense network.
        sites: Its layers that may be rewritten.
        timer: How layers are timed.

    Returns:
        One of `MULTIPLES`, or 1.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    able = [s for s in sites if OUTPUT.name in s.schemes and s.calls]
    slower: dict[int, list[float]] = {m: [] for m in MULTIPLES}
    for site in sorted(able, key=lambda s: -s.macs)[:LAYERS]:
        top = MULTIPLES[0] * (break_even(site, OUTPUT.name, lambda c: c.macs) // (2 * MULTIPLES[0]))
        if not top:
            continue
        ranks = [top, *(top - m + 1 for m in MULTIPLES)]
        layers = [random_chain(site.geometry, OUTPUT.name, (r,), modules[site.name]) for r in ranks]
        shape = site.input_shape(site.calls[0], timer.batch)
        pace = Pace(min_seconds=MIN_SECONDS)
        rounded, *short = timer.time([(layer, shape) for layer in layers], pace)
        for multiple, seconds in zip(MULTIPLES, short, strict=True):
            slower[multiple].append(rounded / seconds)
    free = [m for m, found in slower.items() if found and statistics.median(found) <= FREE]
    return max(free, default=1)
