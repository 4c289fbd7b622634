"""A budget of real time: candidates whose cost is what they take on this device.

Layers are timed one by one, at the shapes that occur, in turns with the dense layer. What the rest
of the network takes is the measured whole less the dense layers' sum, so that a plan's time can be
predicted; the search over whole networks (`compress.choose.by_time.search`) corrects what that
misses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from compress.choose.budgets import Budgets
from compress.network.chains import random_chain
from compress.network.sites import LayerSite
from compress.plan import DENSE, NARROWER, Candidate, Choice
from compress.progress import Track, silent
from compress.timing.layers import LayerTimer
from compress.timing.turns import Pace

# Candidates of one scheme that are timed, and the turns of each.
TIMED = 8


@dataclass(frozen=True)
class TimedBudgets:
    """All budgets of time over one set of timed candidates, in one memory format.

    Attributes:
        budgets: Of candidates with their seconds a batch; everything that no choice changes is
            fixed.
        dense: Seconds of the layers as they are, by name.
        memory_format: What it was all timed in.
    """

    budgets: Budgets
    dense: Mapping[str, float]
    memory_format: str

    @property
    def found(self) -> Mapping[str, list[Candidate]]:
        """Candidates by layer name."""
        return self.budgets.found

    @property
    def total(self) -> float:
        """Seconds of the whole dense network."""
        return self.budgets.total

    def spend(self, fraction: float) -> list[Choice]:
        """One choice per layer: the least summed loss within a fraction of ``total``, as predicted.

        Raises:
            BudgetError: No choice is predicted to be so fast.
        """
        return [self._explained(choice) for choice in self.budgets.spend(fraction)]

    def loss(self, choices: Iterable[Choice]) -> float:
        """Summed predicted loss of a plan's choices."""
        made_of = {c.name: c for c in choices}
        made = {c.name: (c.scheme, c.ranks) for c in made_of.values()}
        lost = 0.0
        for name, found in self.found.items():
            scheme, ranks = made[name]
            kept = (DENSE, ()) if scheme in NARROWER else (scheme, ranks)
            lost += next(c.loss for c in found if (c.scheme, c.ranks) == kept)
        return lost + self._of_widths(made_of)

    def dearer(self, factors: Mapping[str, float]) -> TimedBudgets:
        """Budgets in which some layers lose more than was predicted; see `Budgets.dearer`."""
        return replace(self, budgets=self.budgets.dearer(factors))

    def unfactored(self) -> TimedBudgets | None:
        """Budgets of widths alone, ranks as far as the user fixed them; None without widths."""
        widths = self.budgets.widths
        if widths is None:
            return None
        found = {
            name: [c for c in candidates if c.scheme == DENSE] or candidates
            for name, candidates in self.found.items()
        }
        widths = replace(widths, found=found)
        return replace(self, budgets=replace(self.budgets, found=found, widths=widths))

    def _of_widths(self, choices: Mapping[str, Choice]) -> float:
        """What a plan's widths lose."""
        widths = self.budgets.widths
        if widths is None:
            return 0.0
        pattern = {}
        for option in widths.options:
            width = choices[option.group.producers[0].name].width
            pattern[option.group.name] = option.group.size if width is None else width[1]
        return widths.loss(pattern)

    def smallest(self) -> float:
        """The smallest fraction of ``total`` that is predicted to be reachable."""
        # A hair more, so that rounding does not put it out of its own reach.
        return self.budgets.smallest() * (1 + 1e-9)

    def _explained(self, choice: Choice) -> Choice:
        """Add measured times, and why a layer was left dense."""
        if choice.width is not None:
            return self._narrowed(choice, choice.width)
        if choice.name not in self.found:
            return choice
        found, dense = self.found[choice.name], self.dense[choice.name]
        if choice.rewritten:
            kept = (choice.scheme, choice.ranks)
            seconds = next(c.seconds for c in found if (c.scheme, c.ranks) == kept)
            return replace(choice, dense_seconds=dense, seconds=seconds)
        least = min((c.seconds or 0.0 for c in found if c.scheme != DENSE), default=None)
        reason = choice.reason
        if least is None:
            reason = "no rewrite saves MACs"
        elif least >= dense:
            reason = (
                f"no rewrite is faster on this device (the fastest takes {least / dense:.2f} of "
                "the layer's time)"
            )
        return replace(choice, dense_seconds=dense, seconds=dense, reason=reason)

    def _narrowed(self, choice: Choice, width: tuple[int, int]) -> Choice:
        """Add times of a layer that becomes narrower, at its width as predicted."""
        assert self.budgets.widths is not None  # or it would not
        costs, site = self.budgets.widths.costs, self.budgets.widths.sites[choice.name]
        dense = self.dense[choice.name]
        seconds: float | None = costs.dense(site, width)
        if choice.factored:
            kept = (choice.scheme, choice.ranks)
            candidate = next(c for c in self.found[choice.name] if (c.scheme, c.ranks) == kept)
            at_width = costs.narrowed(site, width)(candidate)
            seconds = None if at_width is None else at_width.seconds
        return replace(choice, dense_seconds=dense, seconds=seconds)


def thinned(candidates: Iterable[Candidate], points: int = TIMED) -> list[Candidate]:
    """The candidates worth timing: per scheme the best at each cost, evenly spaced in MACs."""
    by_scheme: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_scheme.setdefault(candidate.scheme, []).append(candidate)
    kept: list[Candidate] = []
    for found in by_scheme.values():
        front: list[Candidate] = []
        for candidate in sorted(found, key=lambda c: (c.macs, c.loss)):
            if not front or candidate.loss < front[-1].loss:
                front.append(candidate)
        low, high = front[0].macs, front[-1].macs
        wanted = [low + (high - low) * i / max(points - 1, 1) for i in range(points)]
        nearest = (min(front, key=lambda c: abs(c.macs - w)) for w in wanted)
        kept += dict.fromkeys(nearest)
    return kept


def timed_candidates(
    model: nn.Module,
    sites: Iterable[LayerSite],
    found: Mapping[str, list[Candidate]],
    how: tuple[LayerTimer, Pace],
    track: Track = silent,
) -> tuple[dict[str, float], dict[str, list[Candidate]]]:
    """Measure every layer and its candidates, in turns.

    Args:
        model: The dense network, on the device and in the dtype of the setting.
        sites: Its layers.
        found: Candidates by layer name.
        how: How layers are timed, and how thoroughly each with its candidates.
        track: Progress.

    Returns:
        Seconds a batch of each layer as it is, and the candidates with theirs, over all calls.
    """
    timer, pace = how
    modules = dict(model.named_modules(remove_duplicate=False))
    free = [site for site in sites if site.name in found]
    dense, timed = {}, {}
    for site in track(free, f"time layers, {timer.setting.memory_format}", len(free)):
        module = modules[site.name]
        rewrites = [c for c in found[site.name] if c.scheme != DENSE]
        chains = [random_chain(site.geometry, c.scheme, c.ranks, module) for c in rewrites]
        shapes = [site.input_shape(call, timer.batch) for call in site.calls]
        flat = timer.time([(layer, s) for layer in (module, *chains) for s in shapes], pace)
        of_layers = (flat[i : i + len(shapes)] for i in range(0, len(flat), len(shapes)))
        dense[site.name], *seconds = map(sum, of_layers)
        spent = dict(zip(rewrites, seconds, strict=True))
        timed[site.name] = [
            replace(c, seconds=spent.get(c, dense[site.name])) for c in found[site.name]
        ]
    return dense, timed
