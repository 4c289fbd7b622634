"""Measuring what a rewrite did: each layer's error, the end metric, the gates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibrate.held_out import HeldOutLoss
from compress.layers import registered_kind
from compress.measure.spread import Spread, squared_error
from compress.network.baseline import Network
from compress.network.narrowing import Cut, within
from compress.result import MeasuredError
from compress.running.forward import ForwardHook, evaluation_mode, forward_hooks, run_model
from compress.running.modules import swapped
from compress.running.structure import placed


@dataclass
class _Sums:
    """Running sums of one layer's errors, in float64."""

    spread: Spread = field(default_factory=Spread)
    alone: float = 0.0
    in_place: float = 0.0
    placed: int = 0  # of the elements, how many the compressed model gave as well

    def errors(self) -> tuple[MeasuredError, MeasuredError]:
        """Measured error alone and in place; alone for both where it was never called in place."""
        alone = self.spread.error(self.alone, self.spread.elements)
        return alone, self.spread.error(self.in_place, self.placed) if self.placed else alone


def measure_layers(
    model: nn.Module,
    compressed: nn.Module,
    names: Iterable[str],
    inputs: Iterable[tuple[Any, Any]],
    cut: Cut | None = None,
) -> dict[str, tuple[MeasuredError, MeasuredError]]:
    """Measure replaced layers against the originals.

    Args:
        model: The dense baseline.
        compressed: The rewritten model.
        names: Names of the replaced layers, the same in both.
        inputs: Batches of inputs and targets.
        cut: Which channels the rewritten model still has; by default all.

    Returns:
        For each name the error *alone* (on the original's input) and *in place* (on what the
        compressed model feeds it).
    """
    before = dict(model.named_modules(remove_duplicate=False))
    after = dict(compressed.named_modules(remove_duplicate=False))
    names = list(names)
    kept = cut or Cut(model, {})
    sums = {name: _Sums() for name in names}
    expected: dict[str, list[Tensor]] = defaultdict(list)

    def original(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            kind = registered_kind(module)
            output = kept.outputs_of(name, output)
            sums[name].spread.see(kind.images(output))
            # The chain is called past its own hooks: this is not a call of the compressed model.
            found = after[name].forward(kept.inputs_of(name, given[0]))
            sums[name].alone += squared_error(found, output)
            expected[name].append(output.clone())

        return hook

    def replaced(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            del module, given
            # A forward that decides by values may call a layer more or less often than before.
            reference = expected[name].pop(0) if expected[name] else None
            if reference is not None and reference.shape == output.shape:
                sums[name].in_place += squared_error(output, reference)
                sums[name].placed += output.numel()

        return hook

    first: dict[nn.Module, ForwardHook] = {before[name]: original(name) for name in names}
    second: dict[nn.Module, ForwardHook] = {after[name]: replaced(name) for name in names}
    device = next(model.parameters()).device
    with torch.no_grad(), evaluation_mode(model), evaluation_mode(compressed):
        for images, _ in inputs:
            images = placed(images, device)
            expected.clear()
            with forward_hooks(first):
                run_model(model, images)
            with forward_hooks(second):
                run_model(compressed, images)
    return {name: s.errors() for name, s in sums.items() if s.spread.elements}


def measured_losses(
    network: Network,
    compressed: nn.Module,
    names: Iterable[str],
    batches: Iterable[Any],
    cut: Cut | None = None,
) -> dict[str, HeldOutLoss]:
    """Measure what each replaced layer alone costs, in the units of the prediction.

    Of classes, the increase of the negative log-likelihood under labels drawn from the original's
    own prediction is KL(original || with that layer replaced); of values, it is half the squared
    error. Both as a mean over some images, with its standard error.

    Args:
        network: The dense baseline; its layers are swapped in and out again.
        compressed: The rewritten model.
        names: Of the replaced layers.
        batches: Inputs of some images, in batches ``[B, ...]``.
        cut: As for `measure_layers`.

    Returns:
        The losses by name; none where nothing says how far results are apart.
    """
    if not network.reading.parts:
        return {}
    after: dict[str, nn.Module] = dict(compressed.named_modules(remove_duplicate=False))
    model, reading = network.model, network.reading
    layers = {}
    for name in filter(None, names):
        layer = after[name]
        if cut is not None:
            layer = within(cut, name, model.get_submodule(name), layer)
        layers[name] = layer
    apart: dict[str, list[Tensor]] = {name: [] for name in layers}
    with torch.inference_mode(), evaluation_mode(model):
        for inputs in batches:
            reference = run_model(model, inputs)
            for name, layer in layers.items():
                with swapped(model, dict.fromkeys(network.site(name).aliases, layer)):
                    found = reading.divergence(reference, run_model(model, inputs))
                apart[name].append(found.double().cpu())
    return {name: HeldOutLoss.of(torch.cat(found)) for name, found in apart.items()}
