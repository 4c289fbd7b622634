"""What both networks compute on the way to their outputs, and how far that is apart.

A network that is also shown what the original computes on the way learns faster than one that only
hears of its outputs (FitNets: Romero et al., 2015). Compared is what modules of the same name give
in the same shape; blocks rather than single layers, where there are any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.running.forward import ForwardHook, evaluation_mode, forward_hooks, run_model
from compress.running.structure import tensors

# At so many places, evenly spread over the network.
PLACES = 8
# At the start all of them together weigh so many times what the outputs do.
WEIGHT = 10.0
# Where squares are this much apart, relative to the original's, there is nothing to learn.
ALIKE = 1e-4

Seen = Mapping[str, Tensor]


@dataclass(frozen=True)
class Features:
    """What is compared on the way.

    Attributes:
        weights: What a mean squared error counts, by the name of the module that gives the feature.
    """

    weights: Mapping[str, float] = field(default_factory=dict)

    @contextmanager
    def seen(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Note what a network computes at these places while it runs, by their names."""
        found: dict[str, Tensor] = {}
        hooks = {model.get_submodule(name): _noting(name, found) for name in self.weights}
        with forward_hooks(hooks):
            yield found

    def apart(self, original: Seen, own: Seen) -> Tensor | float:
        """How far features are apart, all places together; a scalar."""
        return sum(
            (
                weight * (own[name].float() - original[name].float()).square().mean()
                for name, weight in self.weights.items()
                # A forward need not come by everywhere each time.
                if name in own and name in original and own[name].shape == original[name].shape
            ),
            0.0,
        )


def shared(original: nn.Module, model: nn.Module, inputs: Any, distance: float) -> Features:
    """Find features that two networks have in common, and what they count.

    Each place counts as much as any other at the start.

    Args:
        original: The network to learn from.
        model: The one that learns, as it is at the start.
        inputs: A batch, where the networks are.
        distance: How far the outputs are apart for it, as a loss counts them.

    Raises:
        ModelError: A forward fails.
    """
    right, own = (_all_features(network, inputs) for network in (original, model))
    errors = {}
    for name, value in own.items():
        if name in right and right[name].shape == value.shape:
            size = float(right[name].float().square().mean())
            error = float((value.float() - right[name].float()).square().mean())
            if ALIKE * size < error < float("inf"):
                errors[name] = error
    blocks = [name for name in errors if any(True for _ in original.get_submodule(name).children())]
    names = blocks if len(blocks) > 1 else list(errors)
    places = min(PLACES, len(names))
    chosen = [names[(i + 1) * len(names) // places - 1] for i in range(places)]
    each = WEIGHT * distance / max(places, 1)
    return Features({name: each / errors[name] for name in chosen} if each > 0 else {})


def _all_features(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """What modules give that are called once, in order, what is returned in the end left out.

    Where several give the same tensor, as a block and its last layer do, only the last has it.
    """
    found: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def counting(name: str) -> ForwardHook:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                for other in [n for n, t in found.items() if t is output]:
                    del found[other]
                found[name] = output

        return hook

    hooks = {module: counting(name) for name, module in model.named_modules() if name}
    with torch.no_grad(), evaluation_mode(model), forward_hooks(hooks):
        result = list(tensors(run_model(model, inputs)).values())
    return {
        name: value
        for name, value in found.items()
        if calls[name] == 1 and not any(value is output for output in result)
    }


def _noting(name: str, found: dict[str, Tensor]) -> ForwardHook:
    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            found[name] = output

    return hook
