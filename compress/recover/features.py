"""What both networks compute on the way to their outputs, and how far that is apart.

A network that is also shown what the original computes on the way learns faster than one that only
hears of its outputs (FitNets: Romero et al., 2015). Compared is what modules of the same name give
in the same shape; blocks rather than single layers, where there are any.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.running.forward import ForwardHook, evaluation_mode, forward_hooks, run_model
from compress.running.structure import count, part, tensors

# So many images show which places there are, since all that a network computes can be much.
LOOKED_AT = 8
# At so many places, evenly spread over the network.
PLACES = 4
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
                # In one operation each way, since maps are large; in the precision that they have.
                weight * F.mse_loss(own[name], original[name].to(own[name].dtype)).float()
                for name, weight in self.weights.items()
                # A forward need not come by everywhere each time.
                if name in own and name in original and own[name].shape == original[name].shape
            ),
            0.0,
        )


def shared(original: nn.Module, model: nn.Module, inputs: Any) -> Features:
    """Find features that two networks have in common, and what they count.

    Each place counts as much as any other at the start.

    Args:
        original: The network to learn from.
        model: The one that learns, as it is at the start.
        inputs: A batch, where the networks are.

    Raises:
        ModelError: A forward fails.
    """
    # What a collate function of the user's puts together may not be cut into images.
    whole = any(t.dim() == 0 or len(t) != count(inputs) for t in tensors(inputs).values())
    few = inputs if whole else part(inputs, 0, LOOKED_AT)
    there, here = (_places(network, few) for network in (original, model))
    names = [name for name, shape in here.items() if there.get(name) == shape]
    blocks = [name for name in names if any(True for _ in original.get_submodule(name).children())]
    names = blocks if len(blocks) > 1 else names
    all_places = Features(dict.fromkeys(names, 1.0))
    right, own = (_computed(network, few, all_places) for network in (original, model))
    errors = {}
    for name in names:
        size = float(right[name].float().square().mean())
        error = float((own[name].float() - right[name].float()).square().mean())
        if ALIKE * size < error < math.inf:
            errors[name] = error
    names = list(errors)
    places = min(PLACES, len(names))
    chosen = [names[(i + 1) * len(names) // places - 1] for i in range(places)]
    return Features({name: WEIGHT / places / errors[name] for name in chosen})


def _places(model: nn.Module, inputs: Any) -> dict[str, torch.Size]:
    """The shapes of what modules give that are called once, in order, but for the result itself.

    Where several give the same tensor, as a block and its last layer do, only the last has it.
    """
    found: dict[str, tuple[torch.Size, weakref.ref[Tensor]]] = {}
    calls: Counter[str] = Counter()

    def counting(name: str) -> ForwardHook:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Any) -> None:
            calls[name] += 1
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                for other in [n for n, (_, same) in found.items() if same() is output]:
                    del found[other]
                found[name] = output.shape, weakref.ref(output)

        return hook

    hooks = {module: counting(name) for name, module in model.named_modules() if name}
    with torch.no_grad(), evaluation_mode(model), forward_hooks(hooks):
        result = list(tensors(run_model(model, inputs)).values())
    return {
        name: shape
        for name, (shape, same) in found.items()
        if calls[name] == 1 and not any(same() is output for output in result)
    }


def _computed(model: nn.Module, inputs: Any, places: Features) -> dict[str, Tensor]:
    with torch.no_grad(), evaluation_mode(model), places.seen(model) as found:
        run_model(model, inputs)
    return found


def _noting(name: str, found: dict[str, Tensor]) -> ForwardHook:
    def hook(_: nn.Module, __: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            found[name] = output

    return hook
