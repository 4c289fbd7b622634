"""Steps of a size that suits every tensor, clipped, with an average over the last ones.

Adam (Kingma and Ba, 2015) with steps relative to each tensor's own size, as a weight that has been
trained says how large it is: a learning rate of 0.01 changes each by about a hundredth of its root
mean square a step (as in LARS: You et al., 2017; Adafactor: Shazeer and Stern, 2018).
"""

from __future__ import annotations

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
_TINY = 1e-12


@dataclass
class Steps:
    """The weights that learn, and what their steps are taken by.

    Attributes:
        weights: By name.
        sizes: What steps of each are relative to.
        averages: Each weight's average over the last steps.
        taken: How many steps were taken.
    """

    weights: Mapping[str, Tensor]
    sizes: dict[str, float]
    averages: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    length: float = 0.0
    taken: int = 0

    @classmethod
    def begin(cls, weights: Mapping[str, Tensor]) -> Steps:
        """Make a beginning from weights as they are.

        A tensor that is all zero, as an untrained bias, goes in steps relative to the mean size.
        """
        sizes = {name: float(w.detach().square().mean().sqrt()) for name, w in weights.items()}
        known = [size for size in sizes.values() if size > 0]
        mean = sum(known) / max(len(known), 1)
        return cls(
            weights,
            {name: size or mean for name, size in sizes.items()},
            {name: w.detach().clone() for name, w in weights.items()},
            {name: torch.zeros_like(w) for name, w in weights.items()},
            {name: torch.zeros_like(w) for name, w in weights.items()},
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
        usual = self.length / (1 - SECOND**self.taken) if self.taken else length
        shorter = min(1.0, LONGEST * usual / max(length, _TINY))
        self.length = SECOND * self.length + (1 - SECOND) * length * shorter
        self.taken += 1
        early = 1 - FIRST**self.taken, 1 - SECOND**self.taken
        for name, slope in slopes.items():
            weight, first, second = self.weights[name].data, self.first[name], self.second[name]
            first.lerp_(slope * shorter, 1 - FIRST)
            second.lerp_((slope * shorter).square(), 1 - SECOND)
            scale = (second / early[1]).sqrt_().add_(_TINY)
            weight.addcdiv_(first, scale, value=-rate * self.sizes[name] / early[0])
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
