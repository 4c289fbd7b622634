"""Steps of a size that suits every tensor, clipped, with an average over the last ones.

Matrices, kernels of convolutions among them, go along their orthogonalised momentum, which takes
all directions equally far (Muon: Jordan et al., 2024); all else goes by Adam (Kingma and Ba, 2015).
Both kinds of steps are relative to each tensor's own size, as a weight that has been trained says
how large it is: a learning rate of 0.01 changes each by up to a hundredth of its root mean square a
step (as in LARS: You et al., 2017; Adafactor: Shazeer and Stern, 2018).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# How much of the running averages of the gradient and of its square a step leaves.
FIRST, SECOND = 0.9, 0.99
# A gradient so many times as long as the recent ones is cut to that.
LONGEST = 2.0
# The average over weights leaves this much of itself a step.
AVERAGE = 0.98
# How much of a matrix's momentum a step leaves, and the size of its steps for a rate of 1: about
# that of Adam's, whose root mean square is below 1 too (Liu et al., "Muon is scalable for LLM
# training", 2025).
MOMENTUM, ALIKE = 0.95, 1 / 3
# A quintic that brings singular values near 1 in a few turns (Jordan et al., 2024).
QUINTIC, TURNS = (3.4445, -4.7750, 2.0315), 5
# The share of the operations of learning from a batch that the choice of a direction may take.
DIRECTION = 0.1
_TINY = 1e-12


@dataclass
class Steps:
    """The weights that learn, and what their steps are taken by.

    Attributes:
        weights: By name.
        sizes: What steps of each are relative to.
        matrices: Names of those whose momentum is orthogonalised.
        averages: Each weight's average over the last steps.
        taken: How many steps were taken.
    """

    weights: Mapping[str, Tensor]
    sizes: dict[str, float]
    averages: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    matrices: frozenset[str] = frozenset()
    length: float = 0.0
    taken: int = 0

    @classmethod
    def begin(cls, weights: Mapping[str, Tensor], operations: float = 0.0) -> Steps:
        """Make a beginning from weights as they are.

        A tensor that is all zero, as an untrained bias, goes in steps relative to the mean size.

        Args:
            weights: By name.
            operations: How many floating-point operations may go into orthogonalising matrices at
                every step; the smallest come first, and the others go by Adam.
        """
        sizes = {name: float(w.detach().square().mean().sqrt()) for name, w in weights.items()}
        known = [size for size in sizes.values() if size > 0]
        mean = sum(known) / max(len(known), 1)
        matrices = _affordable(weights, operations)
        return cls(
            weights,
            {name: size or mean for name, size in sizes.items()},
            {name: w.detach().clone() for name, w in weights.items()},
            {name: torch.zeros_like(w) for name, w in weights.items()},
            {name: torch.zeros_like(w) for name, w in weights.items() if name not in matrices},
            matrices,
        )

    def step(self, rate: float) -> bool:
        """Take a step along the weights' gradients.

        Args:
            rate: How far, relative to each tensor's size.

        Returns:
            Whether it was taken; it is not where gradients are not finite.
        """
        slopes = {n: w.grad for n, w in self.weights.items() if w.grad is not None}
        if not slopes:
            return True
        length = float(torch.stack([g.square().sum() for g in slopes.values()]).sum().sqrt())
        if not length < float("inf"):
            return False
        # Gradients of nothing but zeros say nothing of how long they usually are.
        usual = (self.length / (1 - SECOND**self.taken) if self.taken else 0.0) or length
        shorter = min(1.0, LONGEST * usual / max(length, _TINY))
        self.length = SECOND * self.length + (1 - SECOND) * length * shorter
        self.taken += 1
        early = 1 - FIRST**self.taken, 1 - SECOND**self.taken
        for name, slope in slopes.items():
            weight, first = self.weights[name].data, self.first[name]
            slope = slope * shorter
            if name in self.matrices:
                first.mul_(MOMENTUM).add_(slope)
                way = orthogonal(slope.add(first, alpha=MOMENTUM).flatten(1)).view_as(weight)
                way *= ALIKE * way.numel() ** 0.5 / way.norm().clamp_min(_TINY)
            else:
                second = self.second[name]
                first.lerp_(slope, 1 - FIRST)
                second.lerp_(slope.square(), 1 - SECOND)
                way = first / (second / early[1]).sqrt_().add_(_TINY) / early[0]
            weight.add_(way, alpha=-rate * self.sizes[name])
        left = min(AVERAGE, (1 + self.taken) / (10 + self.taken))
        for name, weight in self.weights.items():
            self.averages[name].lerp_(weight.data, 1 - left)
        return True

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by names that `load` knows."""
        kinds = {
            "weight": {n: w.data for n, w in self.weights.items()},
            "average": self.averages, "first": self.first, "second": self.second,
        }  # fmt: skip
        return {f"{kind}:{name}": t for kind, found in kinds.items() for name, t in found.items()}

    def load(self, tensors: Mapping[str, Tensor], length: float, taken: int) -> None:
        """Go on from what `tensors` gave."""
        for name, own in self.tensors().items():
            own.copy_(tensors[name])
        self.length, self.taken = length, taken


def falling(way: float) -> float:
    """The part of a rate that is left at a point of a course: half a cosine, from 1 to 0.

    Args:
        way: The share of the course that is behind.
    """
    return 0.5 * (1 + math.cos(math.pi * way))


def operations_for(macs: float) -> float:
    """How many operations may go into directions where a forward takes so many MACs."""
    # Forward and backward take some six operations for each multiply-accumulate.
    return DIRECTION * 6 * macs


def orthogonal(matrix: Tensor) -> Tensor:
    """Bring all singular values of a matrix near 1, those that are next to nothing apart.

    Args:
        matrix: ``[rows, columns]``.

    Returns:
        A matrix with the same singular vectors, and singular values from about 0.7 to 1.2.
    """
    found: Tensor = matrix / matrix.norm().clamp_min(_TINY)
    tall = found.shape[0] > found.shape[1]
    found = found.T if tall else found
    a, b, c = QUINTIC
    for _ in range(TURNS):
        square = found @ found.T
        quartic = torch.addmm(square, square, square, beta=b, alpha=c)
        found = torch.addmm(found, quartic, found, beta=a)
    return found.T if tall else found


def _affordable(weights: Mapping[str, Tensor], operations: float) -> frozenset[str]:
    """The matrices that so many operations suffice to orthogonalise, the smallest first."""
    costs = {name: _operations(w) for name, w in weights.items() if _is_matrix(w)}
    chosen = set()
    for name in sorted(costs, key=lambda n: costs[n]):
        operations -= costs[name]
        if operations < 0:
            break
        chosen.add(name)
    return frozenset(chosen)


def _is_matrix(weight: Tensor) -> bool:
    """Whether inputs meet outputs in a weight, as they do not in a depthwise kernel."""
    return weight.dim() > 1 and min(weight.shape[:2]) > 1


def _operations(weight: Tensor) -> int:
    """Floating-point operations that orthogonalising a weight takes."""
    rows, columns = weight.shape[0], weight[0].numel()
    short, long = min(rows, columns), max(rows, columns)
    return 2 * TURNS * (2 * short * short * long + short**3)
