"""The multiple-choice knapsack: one candidate per layer, least summed loss within a budget.

It is solved in three steps (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, chapter
11):

1. The relaxation. Walking the lower convex hulls of all layers in the order of falling loss per
   cost finds the Lagrange multiplier at which the budget binds, as bisection on it would, but
   exactly and once. It also bounds the loss of every solution from below.
2. A first solution: the hull points below that multiplier, then whatever single exchanges the
   room they leave allows.
3. Dynamic programming over the layers on (cost, loss) states. A state whose bound does not beat
   the best solution known is dropped, which leaves few, so that the optimum is usually proven;
   where more than a cap remain, those nearest to the bound are kept.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.errors import BudgetError, CalibrationError
from compress.plan import Candidate

# Caps on the partial choices looked at per layer, before pruning, in the two searches: the first
# makes the second's bound sharp.
_LOOKS = (5_000, 30_000)

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


class UnreachableBudgetError(BudgetError):
    """No choice fits the budget.

    Attributes:
        smallest: The smallest cost that can be reached, in the unit of the cost.
    """

    def __init__(self, budget: float, smallest: float) -> None:
        self.smallest = smallest
        super().__init__(
            f"No choice of candidates costs at most {budget:.10g}: the smallest reachable cost is "
            f"{smallest:.10g}. Raise the budget to that, or allow more schemes or lower ranks."
        )


@dataclass(frozen=True)
class _Front:
    """A layer's candidates that no other beats: cost rises, loss falls, both strictly.

    ``picks`` are indices into the layer's candidates; ``hull`` are indices into the front.
    """

    picks: Indices
    cost: Floats
    loss: Floats
    hull: tuple[int, ...]


def allocate(
    options: Sequence[Sequence[Candidate]], budget: float, cost: Callable[[Candidate], float]
) -> list[int]:
    """Pick one candidate per layer: least summed loss, summed cost at most ``budget``.

    The result is the same on every run. Among equal losses of a layer the cheaper candidate wins,
    then the one listed first. It is optimal up to rounding unless more than 30,000 partial choices
    at once stay within reach of the optimum; then it is at least as good as the greedy solution.

    Args:
        options: The candidates of each layer, at least one each.
        budget: The largest summed cost, in the unit of ``cost``.
        cost: What a candidate costs; finite and not negative.

    Returns:
        For each layer the index of the chosen candidate.

    Raises:
        UnreachableBudgetError: Even the cheapest candidates cost more than the budget, or nothing
            may be chosen and the budget is negative.
        BudgetError: The budget is not a finite number.
        CalibrationError: A candidate's predicted loss is not finite.
        ValueError: A layer without candidates, or a cost that is negative or not finite.
    """
    if not math.isfinite(budget):
        raise BudgetError(f"The budget {budget} is not a finite number; give the largest cost.")
    fronts = _fronts(options, cost)
    cheapest = math.fsum(front.cost[0] for front in fronts)
    if cheapest > budget:
        raise UnreachableBudgetError(budget, cheapest)
    if not fronts:
        return []
    chosen, multiplier = _relax(fronts, budget)
    chosen = _exchange(fronts, chosen, budget)
    if multiplier > 0:
        for looks in _LOOKS:
            chosen = _search(fronts, chosen, budget, multiplier, looks)
    return [int(front.picks[i]) for front, i in zip(fronts, chosen, strict=True)]


def frontier(
    options: Sequence[Sequence[Candidate]], cost: Callable[[Candidate], float]
) -> list[tuple[float, float, list[int]]]:
    """List the best choices that a multiplier alone can reach, for sweeps over budgets.

    They are the corners of the lower convex hull of all (cost, loss) pairs, each optimal for a
    budget of its own cost; between corners `allocate` finds better fits for a given budget.

    Args:
        options: The candidates of each layer, at least one each.
        cost: What a candidate costs; finite and not negative.

    Returns:
        ``(cost, loss, picks)`` from the cheapest choice to the one of least loss, cost rising.

    Raises:
        CalibrationError: A candidate's predicted loss is not finite.
        ValueError: A layer without candidates, or a cost that is negative or not finite.
    """
    fronts = _fronts(options, cost)
    if not fronts:
        return []
    chosen = [0] * len(fronts)
    points = [_point(fronts, chosen)]
    for layer, target, _ in _steps(fronts):
        chosen[layer] = target
        points.append(_point(fronts, chosen))
    return points


def _fronts(
    options: Sequence[Sequence[Candidate]], cost: Callable[[Candidate], float]
) -> list[_Front]:
    return [_front(layer, candidates, cost) for layer, candidates in enumerate(options)]


def _front(
    layer: int, candidates: Sequence[Candidate], cost: Callable[[Candidate], float]
) -> _Front:
    if not candidates:
        raise ValueError(f"layer {layer} has no candidates; 'dense' is always one")
    points = []
    for index, candidate in enumerate(candidates):
        price, loss = float(cost(candidate)), float(candidate.loss)
        what = f"candidate {candidate.scheme} {candidate.ranks} of layer {layer}"
        if not math.isfinite(price) or price < 0:
            raise ValueError(f"{what} costs {price}; a cost is a finite number from 0")
        if not math.isfinite(loss):
            raise CalibrationError(
                f"The predicted loss of {what} is {loss}, so that it cannot be compared; the "
                "statistics it came from are damaged. Calibrate again."
            )
        points.append((price, loss, index))
    kept: list[tuple[float, float, int]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return _Front(
        picks=np.array([p[2] for p in kept], dtype=np.intp),
        cost=np.array([p[0] for p in kept]),
        loss=np.array([p[1] for p in kept]),
        hull=_hull(kept),
    )


def _hull(points: Sequence[tuple[float, float, int]]) -> tuple[int, ...]:
    """Return the corners of the lower convex hull of points with rising cost (monotone chain)."""
    hull: list[int] = []
    for i, (x, y, _) in enumerate(points):
        while len(hull) > 1:
            (x0, y0, _), (x1, y1, _) = points[hull[-2]], points[hull[-1]]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append(i)
    return tuple(hull)


def _steps(fronts: Sequence[_Front]) -> Iterator[tuple[int, int, float]]:
    """Yield ``(layer, front index, loss saved per cost)`` from the cheapest choice up.

    A heap of each layer's next step keeps a layer's own steps in order whatever the rounding.
    """

    def step(layer: int, corner: int) -> tuple[float, int, int]:
        front = fronts[layer]
        a, b = front.hull[corner - 1], front.hull[corner]
        with np.errstate(over="ignore"):
            slope = (front.loss[a] - front.loss[b]) / (front.cost[b] - front.cost[a])
        return -float(slope), layer, corner

    heap = [step(layer, 1) for layer, front in enumerate(fronts) if len(front.hull) > 1]
    heapq.heapify(heap)
    while heap:
        slope, layer, corner = heapq.heappop(heap)
        yield layer, fronts[layer].hull[corner], -slope
        if corner + 1 < len(fronts[layer].hull):
            heapq.heappush(heap, step(layer, corner + 1))


def _point(fronts: Sequence[_Front], chosen: Sequence[int]) -> tuple[float, float, list[int]]:
    return (
        _total_cost(fronts, chosen),
        math.fsum(front.loss[i] for front, i in zip(fronts, chosen, strict=True)),
        [int(front.picks[i]) for front, i in zip(fronts, chosen, strict=True)],
    )


def _total_cost(fronts: Sequence[_Front], chosen: Sequence[int]) -> float:
    return math.fsum(front.cost[i] for front, i in zip(fronts, chosen, strict=True))


def _relax(fronts: Sequence[_Front], budget: float) -> tuple[list[int], float]:
    """Return the hull choice within the budget and the multiplier at which the budget binds.

    The multiplier is zero where the budget does not bind: then every layer has its least loss.
    """
    chosen = [0] * len(fronts)
    for layer, target, slope in _steps(fronts):
        before = chosen[layer]
        chosen[layer] = target
        if _total_cost(fronts, chosen) > budget:
            chosen[layer] = before
            return chosen, slope
    return chosen, 0.0


def _exchange(fronts: Sequence[_Front], chosen: list[int], budget: float) -> list[int]:
    """Fill the room that is left, one layer's largest saving at a time."""
    chosen = list(chosen)
    while True:
        room = budget - _total_cost(fronts, chosen)
        best = (0.0, -1, -1)
        for layer, front in enumerate(fronts):
            now = chosen[layer]
            target = int(np.searchsorted(front.cost, front.cost[now] + room, side="right")) - 1
            if target > now and front.loss[now] - front.loss[target] > best[0]:
                best = (float(front.loss[now] - front.loss[target]), layer, target)
        _, layer, target = best
        if layer < 0:
            return chosen
        trial = [*chosen[:layer], target, *chosen[layer + 1 :]]
        if _total_cost(fronts, trial) > budget:  # the room itself was rounded
            return chosen
        chosen = trial


def _search(
    fronts: Sequence[_Front], chosen: list[int], budget: float, multiplier: float, looks: int
) -> list[int]:
    """Improve ``chosen`` by dynamic programming over the layers.

    With multiplier ``m`` a candidate's excess is ``loss + m cost`` above the least of its layer.
    The loss of any full choice is ``bound + sum of excesses + m (budget - cost)``, so a partial
    choice whose excess reaches ``best loss - bound`` cannot improve on the best.
    """
    if not math.isfinite(multiplier):
        return chosen
    reduced = [front.loss + multiplier * front.cost for front in fronts]
    bound = math.fsum(float(r.min()) for r in reduced) - multiplier * budget
    best = math.fsum(front.loss[i] for front, i in zip(fronts, chosen, strict=True))
    gap = best - bound
    allowed = [np.flatnonzero(r - r.min() < gap) for r in reduced]
    if gap <= 0 or any(len(a) == 0 for a in allowed):
        return chosen
    order = sorted(range(len(fronts)), key=lambda layer: (len(allowed[layer]), layer))
    rest = math.fsum(float(front.cost[a[0]]) for front, a in zip(fronts, allowed, strict=True))
    cost, loss, excess = np.zeros(1), np.zeros(1), np.zeros(1)
    trail: list[tuple[Indices, Indices]] = []
    for layer in order:
        front, keep = fronts[layer], allowed[layer]
        rest -= float(front.cost[keep[0]])
        if len(cost) * len(keep) > looks:
            nearest = np.sort(np.argsort(excess, kind="stable")[: max(looks // len(keep), 1)])
            cost, loss, excess = cost[nearest], loss[nearest], excess[nearest]
        else:
            nearest = np.arange(len(cost))
        new_cost = (cost[:, None] + front.cost[keep]).ravel()
        new_loss = (loss[:, None] + front.loss[keep]).ravel()
        new_excess = (excess[:, None] + (reduced[layer] - reduced[layer].min())[keep]).ravel()
        room = (budget - rest) * (1 + 1e-12)  # rounding may not shut out an exact fit
        alive = np.flatnonzero((new_excess < gap) & (new_cost <= room))
        alive = alive[_undominated(new_cost[alive], new_loss[alive])]
        trail.append((nearest[alive // len(keep)], keep[alive % len(keep)]))
        cost, loss, excess = new_cost[alive], new_loss[alive], new_excess[alive]
    for state in np.argsort(loss, kind="stable"):
        if loss[state] >= best:
            break
        found = _walk_back(order, trail, int(state))
        if _total_cost(fronts, found) <= budget:
            return found
    return chosen


def _undominated(cost: Floats, loss: Floats) -> Indices:
    """Return the indices of the states that no state of at most their cost equals in loss."""
    order = np.lexsort((loss, cost))
    falling = loss[order]
    least = np.minimum.accumulate(falling)
    first = np.ones(len(order), dtype=bool)
    first[1:] = falling[1:] < least[:-1]
    return np.asarray(order[first], dtype=np.intp)


def _walk_back(
    order: Sequence[int], trail: Sequence[tuple[Indices, Indices]], state: int
) -> list[int]:
    found = [0] * len(order)
    for layer, (parents, choices) in zip(reversed(order), reversed(trail), strict=True):
        found[layer] = int(choices[state])
        state = int(parents[state])
    return found
