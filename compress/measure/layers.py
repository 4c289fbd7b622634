"""Measuring what a rewrite did: each layer's error, the end metric, the gates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress.layers import registered_kind
from compress.result import MeasuredError
from compress.running.forward import ForwardHook, evaluation_mode, forward_hooks, run_model
from compress.running.modules import swapped
from compress.running.outputs import to_logits


@dataclass
class _Sums:
    """Running sums of one layer's errors, in float64."""

    alone: float = 0.0
    in_place: float = 0.0
    elements: int = 0
    placed: int = 0  # of the elements, how many the compressed model gave as well
    rows: int = 0
    # By channel, from the first batch on.
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def see(self, reference: Tensor) -> None:
        """Add the statistics of original outputs ``[batch, channels, h, w]``."""
        values = reference.double().transpose(0, 1).flatten(1)
        self.total = values.sum(1) + self.total
        self.squares = (values**2).sum(1) + self.squares
        self.rows += values.shape[1]
        self.elements += values.numel()

    def variance(self) -> float:
        """Mean over the channels of the original output's variance."""
        mean = self.total / self.rows
        found = float((self.squares / self.rows - mean**2).mean())
        # What cancellation leaves of a constant output is not variance.
        return found if found > 1e-12 * float((mean**2).mean()) else 0.0

    def errors(self) -> tuple[MeasuredError, MeasuredError]:
        """Measured error alone and in place; alone for both where it was never called in place."""
        variance = self.variance()
        alone = _error(self.alone / self.elements, variance)
        return alone, _error(self.in_place / self.placed, variance) if self.placed else alone


def _error(mse: float, variance: float) -> MeasuredError:
    return MeasuredError(mse, mse / variance if variance > 1e-20 else None)


def measure_layers(
    model: nn.Module,
    compressed: nn.Module,
    names: Iterable[str],
    inputs: Iterable[tuple[Tensor, Tensor]],
) -> dict[str, tuple[MeasuredError, MeasuredError]]:
    """Measure replaced layers against the originals.

    Args:
        model: The dense baseline.
        compressed: The rewritten model.
        names: Names of the replaced layers, the same in both.
        inputs: Batches of images and labels.

    Returns:
        For each name the error *alone* (on the original's input) and *in place* (on what the
        compressed model feeds it).
    """
    before = dict(model.named_modules(remove_duplicate=False))
    after = dict(compressed.named_modules(remove_duplicate=False))
    names = list(names)
    sums = {name: _Sums() for name in names}
    expected: dict[str, list[Tensor]] = defaultdict(list)

    def original(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            kind = registered_kind(module)
            sums[name].see(kind.images(output))
            # The chain is called past its own hooks: this is not a call of the compressed model.
            sums[name].alone += _squared(after[name].forward(given[0]), output)
            expected[name].append(output.clone())

        return hook

    def replaced(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            del module, given
            # A forward that decides by values may call a layer more or less often than before.
            reference = expected[name].pop(0) if expected[name] else None
            if reference is not None and reference.shape == output.shape:
                sums[name].in_place += _squared(output, reference)
                sums[name].placed += output.numel()

        return hook

    first: dict[nn.Module, ForwardHook] = {before[name]: original(name) for name in names}
    second: dict[nn.Module, ForwardHook] = {after[name]: replaced(name) for name in names}
    device = next(model.parameters()).device
    with torch.no_grad(), evaluation_mode(model), evaluation_mode(compressed):
        for images, _ in inputs:
            images = images.to(device)
            expected.clear()
            with forward_hooks(first):
                run_model(model, images)
            with forward_hooks(second):
                run_model(compressed, images)
    return {name: s.errors() for name, s in sums.items() if s.elements}


def _squared(output: Tensor, reference: Tensor) -> float:
    return float(((output - reference).double() ** 2).sum())


def measured_losses(
    model: nn.Module, compressed: nn.Module, names: Mapping[str, tuple[str, ...]], inputs: Tensor
) -> dict[str, float]:
    """Measure what each replaced layer alone costs, in the units of the prediction.

    The increase of the negative log-likelihood under labels drawn from the original's own
    prediction is KL(original || with that layer replaced), here the mean over some images.

    Args:
        model: The dense baseline; layers are swapped in and out again.
        compressed: The rewritten model.
        names: Aliases of every replaced layer, by name.
        inputs: Images ``[B, ...]``.
    """
    after: dict[str, nn.Module] = dict(compressed.named_modules(remove_duplicate=False))
    losses = {}
    with torch.inference_mode(), evaluation_mode(model):
        output = run_model(model, inputs)
        logits = to_logits(output)
        reference = torch.log_softmax(logits(output).double(), 1)
        for name, aliases in names.items():
            if not name:
                continue
            with swapped(model, dict.fromkeys(aliases, after[name])):
                trial = torch.log_softmax(logits(run_model(model, inputs)).double(), 1)
            losses[name] = float((reference.exp() * (reference - trial)).sum(1).mean())
    return losses
