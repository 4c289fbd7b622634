"""Measuring a finished model: one alone, or a result against the original it came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.artefact.manifest import (
    is_artefact,
    memory_format,
    read_manifest,
)
from compress.artefact.model import load_result
from compress.config import RunConfig
from compress.data import ImageSet, Preprocessing, batches, check_labels
from compress.errors import ConfigError
from compress.inputs.functions import metric_function
from compress.inputs.load import batch_size_for, load_model, open_images, preprocessing_of
from compress.inputs.models import build_model
from compress.measure.accuracy import all_logits, custom_value, require_labels
from compress.measure.cost import model_cost
from compress.measure.paired import compare_logits
from compress.progress import Track, silent
from compress.result import Cost, CustomMetric
from compress.timing.networks import time_network


@dataclass(frozen=True)
class Timed:
    """Median seconds of a batch."""

    batch_size: int
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """One model, measured.

    Attributes:
        model: The spec it was built from.
        file: The checkpoint or the result.
        compressed: Whether it is a result of this package.
        dtype: The floating type of its tensors.
        images: How many images it was measured on.
        top1: Accuracy, a fraction; None without labels or with a metric of the user's own.
        top5: The same for the five likeliest; None for five classes or fewer.
        ece: Expected calibration error.
        custom: What the user's own metric gave (``before`` and ``after`` are equal).
        cost: MACs, parameters, bytes.
        latency: Measured times.
        device: Where it was measured, with ``threads`` CPU threads.
        warnings: What the user should know.
    """

    model: str
    file: str
    compressed: bool
    dtype: str
    images: int
    top1: float | None
    top5: float | None
    ece: float | None
    custom: CustomMetric | None
    cost: Cost
    latency: tuple[Timed, ...]
    device: str
    threads: int
    warnings: tuple[str, ...]


def evaluate_model(
    config: RunConfig, *, trust_code: bool = False, track: Track = silent
) -> Evaluation:
    """Measure one model: a checkpoint, or a result of `compress run`.

    Args:
        config: ``checkpoint`` names the file; images are ``test``, else ``data``.
        trust_code: As `load_result`.
        track: Progress.

    Raises:
        CompressError: Something is missing or cannot be used.
    """
    if not config.checkpoint:
        raise ConfigError("No checkpoint given; pass it, or set it with --config.")
    spec = config.test or config.data
    if not spec:
        raise ConfigError("No images given; pass --test SPEC (or --data SPEC).")
    compressed = is_artefact(config.checkpoint)
    if compressed:
        module, name = load_result(config.checkpoint, config.model, trust_code)
        preprocessing = _preprocessing(config, name)
    else:
        if not config.model:
            raise ConfigError("No model given (how the network is built); pass --model SPEC.")
        module, _, dtype, preprocessing = load_model(config)
        module, name = module.to(dtype), config.model
    images = open_images(spec, config, module, preprocessing)
    form = memory_format(read_manifest(config.checkpoint)) if compressed else "contiguous"
    return measured(module.to(config.device), name, compressed, images, config, track, form)


def _preprocessing(config: RunConfig, spec: str) -> Preprocessing:
    preset = build_model(spec).preset if spec.startswith("torchvision:") else None
    return preprocessing_of(config, preset)


def measured(
    model: nn.Module,
    spec: str,
    compressed: bool,
    images: ImageSet,
    config: RunConfig,
    track: Track = silent,
    form: str = "contiguous",
) -> Evaluation:
    """Measure a model on all of some images; arguments as the fields of `Evaluation`.

    ``form`` is the memory format that it is timed in.
    """
    reference = next(model.parameters())
    example = images[0][0].unsqueeze(0).to(reference)
    loaded = batches(images, batch_size_for(config, example), config.workers)
    own = metric_function(config)
    top1 = top5 = ece = None
    custom: CustomMetric | None = None
    warnings: list[str] = []
    if own is not None:
        value = custom_value(own, model, loaded)
        custom = CustomMetric(config.metric_fn, value, value)
    else:
        require_labels(images)
        logits = all_logits(model, loaded, "evaluate", track)
        warnings += check_labels(images, logits.shape[1])
        found = compare_logits(logits, logits, torch.tensor(images.labels))
        top1, top5, ece = found.top1_before, found.top5_before, found.ece_before
        if found.near_chance:
            warnings.append(
                "It is hardly better than chance; check the order of the classes (--class-map) "
                "and the normalisation (--mean, --std)."
            )
    return Evaluation(
        model=spec,
        file=config.checkpoint,
        compressed=compressed,
        dtype=str(reference.dtype).removeprefix("torch."),
        images=len(images),
        top1=top1,
        top5=top5,
        ece=ece,
        custom=custom,
        cost=model_cost(model, example),
        latency=tuple(_timed(model, example, n, form) for n in sorted({1, config.latency_batch})),
        device=str(reference.device),
        threads=torch.get_num_threads(),
        warnings=tuple(warnings),
    )


def _timed(model: nn.Module, example: Tensor, batch: int, form: str) -> Timed:
    images = example.expand(batch, *example.shape[1:]).contiguous()
    return Timed(batch, time_network({"model": model}, images, memory_format=form)["model"])
