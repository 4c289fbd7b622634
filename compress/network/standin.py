"""Which layers a chain can stand for: those that the model calls, and does nothing else with.

A chain takes one tensor and is no ``nn.Linear``. A forward that reads ``self.fc.in_features``, asks
for the type of a layer, hands it an output size, or reaches it through a plain list instead of its
name would fail with a chain, or do something else. Each layer is therefore put into an
``nn.Sequential`` of its own for a trial forward, which computes the same and has all that a chain
has; where that is not the same to the model, the layer is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compress.network.sites import LayerSite
from compress.running.forward import (
    ForwardHook,
    evaluation_mode,
    forward_hooks,
    run_model,
    same_outputs,
)
from compress.running.modules import swapped

_PAST_ITS_NAME = (
    "the model reaches it past its name (from a plain list or another attribute), where a rewrite "
    "would not be seen"
)


def without_read_layers(
    model: nn.Module, sites: Sequence[LayerSite], example: Any
) -> tuple[LayerSite, ...]:
    """Return the sites, with a reason to be kept for those that no chain can stand for.

    Args:
        model: The network; it is left as it was.
        sites: Its layers.
        example: One input with the batch axis.
    """
    # Where the model itself is the layer there is nobody to do anything else with it.
    trial = _Trial(model, example)
    suspects = [site for site in sites if site.skip is None and site.name]
    reasons = trial.reasons(suspects)
    return tuple(
        replace(site, skip=reasons[site.name]) if site.name in reasons else site for site in sites
    )


class _Trial:
    """Trial forwards of one model on one input."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model, self.example = model, example
        self.expected = self._forward()

    def reasons(self, sites: Sequence[LayerSite]) -> dict[str, str]:
        """Reasons to keep some of the sites, by name; halves are tried until one layer is left."""
        reason = self._reason(sites) if sites else None
        if reason is None:
            return {}
        if len(sites) == 1:
            return {sites[0].name: reason}
        middle = len(sites) // 2
        return self.reasons(sites[:middle]) | self.reasons(sites[middle:])

    def _reason(self, sites: Sequence[LayerSite]) -> str | None:
        """Why the model is another with stand-ins for these layers; None where it is the same."""
        calls = dict.fromkeys([site.name for site in sites], 0)

        def counter(name: str) -> ForwardHook:
            def count(*_: object) -> None:
                calls[name] += 1

            return count

        modules = dict(self.model.named_modules(remove_duplicate=False))
        found = {s.name: nn.Sequential(modules[s.name]).eval() for s in sites}
        stand_ins = {alias: found[s.name] for s in sites for alias in s.aliases}
        hooks: dict[nn.Module, ForwardHook] = {found[name]: counter(name) for name in calls}
        try:
            with swapped(self.model, stand_ins), forward_hooks(hooks):
                output = self._forward()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the user's forward may raise anything about a stand-in
            cause = error.__cause__ or error  # without what `run_model` says of a failed forward
            text = " ".join(str(cause).split()) or type(cause).__name__
            return f"the model does more with it than call it with one tensor ({text})"
        if any(calls[site.name] != len(site.calls) for site in sites):
            return _PAST_ITS_NAME
        if not same_outputs(self.expected, output):
            return "the model looks at what it is, and computes something else with a chain"
        return None

    def _forward(self) -> Any:
        # Entered anew each time: a forward that draws random numbers draws the same ones.
        with torch.no_grad(), evaluation_mode(self.model):
            return run_model(self.model, self.example)
