"""Measuring one finished model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compress.artefact.manifest import is_artefact
from compress.artefact.model import load_result
from compress.artefact.runtime import Runtime, read_runtime
from compress.config import TORCH, RunConfig
from compress.data import ImageSet, Loader, Preprocessing, check_labels
from compress.deploy.engines import engine_named
from compress.errors import ConfigError
from compress.inputs.functions import metric_function
from compress.inputs.load import batch_size_for, load_model, open_images, preprocessing_of
from compress.inputs.models import preset_of
from compress.measure.accuracy import Yardstick, custom_value, require_labels, require_ranked
from compress.measure.by_task import ByTask, records
from compress.measure.cost import model_cost
from compress.measure.paired import compare_logits
from compress.measure.runtimes import on_runtimes
from compress.measure.speed import most_seconds
from compress.pipeline.places import check_runtime
from compress.progress import Track, silent
from compress.result import Cost, CustomMetric
from compress.running.modules import cast
from compress.running.outputs import read_outputs
from compress.running.structure import batched, expanded, like_weights
from compress.tasks import TaskMeasure
from compress.timing.networks import time_network
from compress.timing.turns import Pace


@dataclass(frozen=True)
class Timed:
    """Median seconds of a batch on a runtime."""

    batch_size: int
    seconds: float
    runtime: str = TORCH


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
        custom: What the task's measure or the user's own gave (``before`` and ``after`` are equal).
        further: Other measures of the task.
        cost: MACs, parameters, bytes.
        latency: Measured times, first those on the runtime asked for; empty with ``no_latency``.
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
    further: tuple[CustomMetric, ...]
    cost: Cost
    latency: tuple[Timed, ...]
    device: str
    threads: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    """A finished model that is to be measured.

    Attributes:
        module: The model, on its device and in its dtype.
        spec: The spec it was built from.
        compressed: Whether it is a result of this package.
        runtime: How it is run when it is timed.
    """

    module: nn.Module
    spec: str
    compressed: bool = False
    runtime: Runtime = field(default_factory=Runtime)


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
    spec = config.test or config.data
    if not spec:
        raise ConfigError("No images given; pass --test SPEC (or --data SPEC).")
    check_runtime(config)
    model, preprocessing = finished(config, trust_code=trust_code)
    images = open_images(spec, config, model.module, preprocessing)
    return measured(model, images, config, track)


def finished(config: RunConfig, *, trust_code: bool) -> tuple[Finished, Preprocessing]:
    """Load a finished model, and how its pictures are prepared.

    Args:
        config: ``checkpoint`` names a checkpoint, or a result of `compress run`.
        trust_code: As `load_result`.

    Raises:
        CompressError: Something is missing or cannot be used.
    """
    if not config.checkpoint:
        raise ConfigError("No checkpoint given; pass it, or set it with --config.")
    if is_artefact(config.checkpoint):
        module, name = load_result(config.checkpoint, config.model, trust_code=trust_code)
        preprocessing = preprocessing_of(config, preset_of(name) if name else None)
        runtime = read_runtime(config.checkpoint)
        return Finished(module.to(config.device), name, True, runtime), preprocessing
    if not config.model:
        raise ConfigError("No model given (how the network is built); pass --model SPEC.")
    module, _, dtype, preprocessing = load_model(config)
    return Finished(cast(module, dtype).to(config.device), config.model), preprocessing


def measured(
    model: Finished, images: ImageSet, config: RunConfig, track: Track = silent
) -> Evaluation:
    """Measure a model on all of some images.

    Args:
        model: The model.
        images: What to measure it on.
        config: Batches, the user's own metric, what to time.
        track: Progress.
    """
    begun = time.perf_counter()
    module = model.module
    reference = next(module.parameters())
    example = like_weights(batched(images[0][0]), reference)
    yardstick = Yardstick(
        Loader(batch_size_for(config, example), config.workers), metric_function(config), track
    )
    found = _end_metric(module, images, yardstick)
    timed, refused = _timed(model, example, config, time.perf_counter() - begun)
    return Evaluation(
        model=model.spec,
        file=config.checkpoint,
        compressed=model.compressed,
        dtype=str(reference.dtype).removeprefix("torch."),
        images=len(images),
        top1=found.top1,
        top5=found.top5,
        ece=found.ece,
        custom=found.custom,
        further=found.further,
        cost=model_cost(module, example),
        latency=timed,
        device=str(reference.device),
        threads=torch.get_num_threads(),
        warnings=(*found.warnings, *refused, *_timing_warnings(model.runtime, config, timed)),
    )


@dataclass(frozen=True)
class _EndMetric:
    """The end metric of one model; fields as those of `Evaluation`."""

    top1: float | None = None
    top5: float | None = None
    ece: float | None = None
    custom: CustomMetric | None = None
    further: tuple[CustomMetric, ...] = ()
    warnings: tuple[str, ...] = ()


def _end_metric(module: nn.Module, images: ImageSet, yardstick: Yardstick) -> _EndMetric:
    if isinstance(yardstick.metric, TaskMeasure):
        by_task = ByTask(yardstick.metric, yardstick.loader, yardstick.track)
        values = by_task.scored(module, images, "evaluate").values()
        decisive, *further = records(yardstick.metric.task, values, values)
        return _EndMetric(custom=decisive, further=tuple(further))
    if yardstick.metric is not None:
        loaded = yardstick.loader.batches(images)
        value = custom_value(yardstick.metric, module, loaded)
        return _EndMetric(custom=CustomMetric(yardstick.metric.name, value, value))
    require_labels(images)
    reading, rows = yardstick.reading, []
    for result in yardstick.results(module, images, "evaluate"):
        if reading is None:
            first = range(min(yardstick.loader.batch_size, len(images)))
            reading = read_outputs(result, [images.target(i) for i in first])
        require_ranked(reading)
        rows.append(reading.scores(result))
    logits = torch.cat(rows)
    warnings = list(check_labels(images, logits.shape[1]))
    found = compare_logits(logits, logits, torch.tensor(images.labels))
    if found.near_chance:
        warnings.append(
            "It is hardly better than chance; check the order of the classes (--class-map) "
            "and the normalisation (--mean, --std)."
        )
    return _EndMetric(
        found.top1_before, found.top5_before, found.ece_before, warnings=tuple(warnings)
    )


def _timed(
    model: Finished, example: Any, config: RunConfig, so_far: float
) -> tuple[tuple[Timed, ...], tuple[str, ...]]:
    """Times on runtimes, and which of them do not take the model."""
    if config.no_latency:
        return (), ()
    if config.runtime == TORCH:
        return _timed_in_torch(model, example, config, so_far), ()
    engine, networks = engine_named(config.runtime, config.device), {"compressed": model.module}
    batches, most = sorted({1, config.latency_batch}), most_seconds(so_far)
    rows, refused = on_runtimes(networks, example, engine, batches, most)
    return tuple(Timed(row.batch_size, row.seconds, row.runtime) for row in rows), refused


def _timed_in_torch(
    model: Finished, example: Any, config: RunConfig, so_far: float
) -> tuple[Timed, ...]:
    """Times by batch, within a share of the seconds so far; what is too slow is left out."""
    timed: list[Timed] = []
    batches, left = sorted({1, config.latency_batch}), most_seconds(so_far)
    for index, batch in enumerate(batches):
        if timed and batch * timed[0].seconds > left:
            break
        begun = time.perf_counter()
        pace = Pace(most_seconds=left / (len(batches) - index))
        form = model.runtime.memory_format
        seconds = time_network({"model": model.module}, expanded(example, batch), form, pace)[
            "model"
        ]
        timed.append(Timed(batch, seconds))
        left -= time.perf_counter() - begun
    return tuple(timed)


def _timing_warnings(
    runtime: Runtime, config: RunConfig, timed: tuple[Timed, ...]
) -> Iterator[str]:
    if runtime.problem:
        yield runtime.problem
    if timed and max(each.batch_size for each in timed) < config.latency_batch:
        yield (
            f"Batches of {config.latency_batch} were not timed: one of them would have taken "
            "longer than timing may take. Pass a smaller --latency-batch."
        )
