"""What an error costs by how smoothly it varies over positions.

Weighting the error of each position by ``G = E[g gᵀ]`` and adding up takes what happens at
different positions for unrelated. Gradients of neighbouring positions are alike, so that an error
which they share costs several times what that sum says, and one that changes from one to the next
costs less. Up to the borders gradients are the same everywhere, and then cosines of all frequencies
(the DCT-II: Ahmed, Natarajan & Rao, 1974) have uncorrelated gradients: the cost is
``Σ_f P(f) e(f)ᵀ G e(f)``, with ``e(f)`` the transformed errors and ``P`` the gradients' power. Of
the lowest frequencies each has a power of its own here, all others one in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.layers import registered_kind
from compress.running.forward import (
    ForwardHook,
    changes_allowed,
    evaluation_mode,
    forward_hooks,
    run_with_gradients,
)
from compress.running.structure import count, with_gradients

# Frequencies along each axis that have a power of their own.
LOWEST = 8

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Frequencies:
    """The power of gradients by frequency, one on average over all.

    Attributes:
        size: Positions along each axis.
        excess: What each of the lowest frequencies has beyond ``rest``, ``[lowest]``, the constant
            first.
        rest: The power of all others.
    """

    size: tuple[int, ...]
    excess: Tensor
    rest: float

    @property
    def positions(self) -> int:
        """How many positions an image has."""
        return math.prod(self.size)


def transformed(value: Tensor) -> Tensor:
    """The lowest frequencies of each channel.

    Args:
        value: ``[images, channels, *size]``.

    Returns:
        ``[images, channels, lowest]``, the constant first.
    """
    for _ in range(2, value.dim()):
        value = torch.tensordot(value, cosines(value.shape[2]).to(value), dims=([2], [1]))
    return value.flatten(2)


def lowest_of_rows(rows: Tensor, size: tuple[int, ...]) -> Tensor:
    """The lowest frequencies of rows ``[groups, images * positions, features]``.

    Returns:
        ``[groups, images, lowest, features]``.
    """
    groups, _, features = rows.shape
    lowest = transformed(rows.reshape(-1, *size, features).movedim(-1, 1))
    found: Tensor = lowest.mT.unflatten(0, (groups, -1))
    return found


def measured(
    model: nn.Module,
    names: Collection[str],
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    *,
    in_place: bool = False,
) -> dict[str, Frequencies]:
    """The power of gradients at the outputs of layers that are called once.

    Args:
        model: The network; left as it was.
        names: Those by which it calls the layers.
        batches: Inputs and targets.
        loss: ``(result, targets) -> summed loss``.
        in_place: Whether the forward changes values in place that gradients need.
    """
    powers = {name: Power() for name in names}
    modules = {name: model.get_submodule(name) for name in names}
    outputs: dict[str, Tensor] = {}

    def noted(name: str) -> ForwardHook:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name] = output

        return hook

    hooks = forward_hooks({module: noted(name) for name, module in modules.items()})
    with evaluation_mode(model), hooks:
        for inputs, targets in batches:
            outputs.clear()
            with torch.enable_grad(), changes_allowed(in_place=in_place):
                total = loss(run_with_gradients(model, with_gradients(inputs)), targets)
                reached = {n: o for n, o in outputs.items() if o.requires_grad}
                if not reached:  # no layer at all, or none that the loss depends on
                    continue
                gradients = torch.autograd.grad(total, [*reached.values()], allow_unused=True)
            for name, gradient in zip(reached, gradients, strict=True):
                if gradient is not None and len(gradient) == count(inputs):
                    powers[name].add(registered_kind(modules[name]).images(gradient))
    found = {name: power.frequencies() for name, power in powers.items()}
    return {name: f for name, f in found.items() if f is not None}


def cosines(length: int) -> Tensor:
    """The lowest cosines over some positions, orthonormal ``[lowest, length]``."""
    count = min(LOWEST, length)
    places = torch.arange(length, dtype=torch.float64) + 0.5
    angles = torch.arange(count, dtype=torch.float64).unsqueeze(1) * places * (math.pi / length)
    rows = angles.cos() * math.sqrt(2 / length)
    rows[0] = 1 / math.sqrt(length)
    return rows


class Power:
    """Adds up the power of gradients."""

    def __init__(self) -> None:
        self.size: tuple[int, ...] = ()
        self.lowest: Tensor | None = None
        self.total = 0.0

    def add(self, gradient: Tensor) -> None:
        """Add gradients ``[images, channels, *size]``; those of another size are left out."""
        size = tuple(gradient.shape[2:])
        if self.lowest is not None and size != self.size:
            return
        found = transformed(gradient).double().square().sum((0, 1)).cpu()
        self.size = size
        self.lowest = found if self.lowest is None else self.lowest + found
        self.total += float(gradient.double().square().sum())

    def frequencies(self) -> Frequencies | None:
        """What was found; None where there is but one position, or nothing at all."""
        positions = math.prod(self.size)
        if self.lowest is None or positions < 2 or not self.total > 0:
            return None
        others = positions - len(self.lowest)
        left = max(self.total - float(self.lowest.sum()), 0.0)
        scale = positions / self.total
        rest = scale * left / others if others else 0.0
        return Frequencies(self.size, (scale * self.lowest - rest).clamp_min(0), rest)
