"""Measuring what a rewrite did: each layer's error, the end metric, the gates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.config import RunConfig
from compress.data import Batches, ImageSet, batches, check_labels
from compress.errors import CompressError, DataError, ModelError
from compress.layers.registry import kind_of
from compress.measure.paired import compare_logits
from compress.network.sites import ForwardHook, evaluation_mode, forward_hooks, run_model
from compress.progress import Track, silent
from compress.result import CustomMetric, EndMetric, GateResult, LayerResult, MeasuredError
from compress.running.finite import check_finite

MetricFunction = Callable[[nn.Module, Batches], float]


@dataclass
class _Sums:
    """Running sums of one layer's errors, in float64."""

    alone: float = 0.0
    in_place: float = 0.0
    elements: int = 0
    placed: int = 0  # of the elements, how many the compressed model gave as well
    rows: int = 0
    total: Tensor | None = None
    squares: Tensor | None = None

    def see(self, reference: Tensor) -> None:
        """Add the statistics of original outputs ``[batch, channels, h, w]``."""
        values = reference.double().transpose(0, 1).flatten(1)
        self.total = values.sum(1) + (0 if self.total is None else self.total)
        self.squares = (values**2).sum(1) + (0 if self.squares is None else self.squares)
        self.rows += values.shape[1]
        self.elements += values.numel()

    def variance(self) -> float:
        """Mean over the channels of the original output's variance."""
        assert self.total is not None
        assert self.squares is not None
        mean = self.total / self.rows
        found = float((self.squares / self.rows - mean**2).mean())
        # What cancellation leaves of a constant output is no variance.
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
            kind = kind_of(module)
            assert kind is not None
            sums[name].see(kind.images(output))
            # The chain is called past its own hooks: this is no call of the compressed model.
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


def all_logits(model: nn.Module, inputs: Batches, describe: str, track: Track = silent) -> Tensor:
    """Outputs of a model on all images, float32 on the CPU ``[images, classes]``.

    Raises:
        ModelError: The outputs are no logits, or not finite.
    """
    reference = next(model.parameters())
    found, seen = [], 0
    with torch.inference_mode(), evaluation_mode(model):
        for images, _ in track(inputs, describe, len(inputs)):
            images = images.to(reference)
            output = run_model(model, images)
            if output.dim() != 2:
                raise ModelError(
                    f"The model's output has shape {tuple(output.shape)} and is no batch of "
                    "logits, so accuracy cannot be measured. Pass --metric-fn "
                    "package.module:function, which takes the model and the batches and returns "
                    "a number (higher is better)."
                )
            check_finite(
                model, images, output, f"on the images from number {seen} ({describe})",
                "check these images, the checkpoint and the normalisation (--mean, --std)",
            )  # fmt: skip
            seen += len(images)
            found.append(output.float().cpu())
    return torch.cat(found)


def compare(
    before: nn.Module,
    after: nn.Module,
    images: ImageSet,
    config: RunConfig,
    *,
    batch_size: int,
    metric: MetricFunction | None = None,
    describe: str = "test",
    before_logits: Tensor | None = None,
    track: Track = silent,
) -> EndMetric:
    """Compare two models on the same images: accuracy, agreement, flips, intervals.

    Args:
        before: The original.
        after: The compressed model, as it will be saved.
        images: What to compare them on.
        config: Workers.
        batch_size: Images a batch.
        metric: A user's own measure for networks that are no classifiers.
        describe: What the images are, for the progress bar.
        before_logits: The original's outputs, where they are known already.
        track: Progress.

    Raises:
        DataError: Labels that do not fit the outputs, or a set that accuracy says nothing about.
    """
    loaded = batches(images, batch_size, config.workers)
    if metric is not None:
        name = config.metric_fn or getattr(metric, "__name__", "metric")
        values = [custom_value(metric, model, loaded) for model in (before, after)]
        custom = CustomMetric(name, values[0], values[1])
        return EndMetric(images=len(images), custom=custom, drop=values[0] - values[1])
    if before_logits is None:
        before_logits = all_logits(before, loaded, f"{describe}: original", track)
    after_logits = all_logits(after, loaded, f"{describe}: compressed", track)
    classes = before_logits.shape[1]
    labelled = min(images.labels) >= 0
    if labelled:
        check_labels(images, classes)
    names = images.classes if len(images.classes) == classes else None
    return compare_logits(
        before_logits,
        after_logits,
        torch.tensor(images.labels) if labelled else None,
        names,
        [images.name(i) for i in range(len(images))],
    )


def custom_value(metric: MetricFunction, model: nn.Module, loaded: Batches) -> float:
    """What a user's own measure gives; the model is left as it was.

    Raises:
        ModelError: The measure fails, or gives no finite number.
    """
    try:
        with evaluation_mode(model):
            value = float(metric(model, loaded))
    except CompressError:
        raise  # images that cannot be read, which it says
    except Exception as error:  # the user's function may raise anything
        raise ModelError(
            f"--metric-fn raised {type(error).__name__}: {' '.join(str(error).split())}; it is "
            "called with the model and its batches, and returns a number (higher is better)."
        ) from error
    if not math.isfinite(value):
        raise ModelError(f"--metric-fn gave {value}; it must return a finite number.")
    return value


def check_gates(
    config: RunConfig, metric: EndMetric | None, layers: Iterable[LayerResult]
) -> tuple[GateResult, ...]:
    """Hold a result to the configuration's limits; what could not be measured has not passed."""
    gates = []
    if config.max_drop is not None:
        value = None if metric is None else metric.drop
        passed = value is not None and value <= config.max_drop
        gates.append(GateResult("max_drop", config.max_drop, value, passed))
    if config.min_agreement is not None:
        value = None if metric is None else metric.agreement
        passed = value is not None and value >= config.min_agreement
        gates.append(GateResult("min_agreement", config.min_agreement, value, passed))
    if config.max_layer_relative_mse is not None:
        worst, where = _worst_layer(layers)
        passed = worst <= config.max_layer_relative_mse
        gates.append(
            GateResult(
                "max_layer_relative_mse", config.max_layer_relative_mse, worst, passed, where
            )
        )
    return tuple(gates)


def _worst_layer(layers: Iterable[LayerResult]) -> tuple[float, str]:
    worst, where = 0.0, ""
    for layer in layers:
        error = layer.errors.validation_alone or layer.errors.fit_alone
        relative = None if error is None else error.relative_mse
        if relative is not None and relative > worst:
            worst, where = relative, layer.name
    return worst, where


def require_labels(images: ImageSet) -> None:
    """Raise `DataError` where a test set has no labels to be right about."""
    if min(images.labels, default=-1) < 0:
        raise DataError(
            f"{images.source.described} has no labels, so nothing can be verified on it; pass a "
            "folder with one folder per class, or arrays with 'labels'."
        )


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
    after = dict(compressed.named_modules(remove_duplicate=False))
    losses = {}
    with torch.inference_mode(), evaluation_mode(model):
        reference = torch.log_softmax(run_model(model, inputs).double(), 1)
        for name, aliases in names.items():
            if not name:
                continue
            old = model.get_submodule(name)
            try:
                _put(model, aliases, after[name])
                trial = torch.log_softmax(run_model(model, inputs).double(), 1)
            finally:
                _put(model, aliases, old)
            losses[name] = float((reference.exp() * (reference - trial)).sum(1).mean())
    return losses


def _put(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
