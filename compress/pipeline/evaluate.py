"""Measuring a finished model: one alone, or a result against the original it came from."""

from __future__ import annotations

import copy
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import __version__
from compress.artefact.model import MODEL_FILE, Manifest, load, read_manifest
from compress.choose import scheme_cost
from compress.config import RunConfig
from compress.data import ImageSet, Preprocessing, batches, check_labels
from compress.errors import ArtefactError, ConfigError
from compress.files import sha256_file
from compress.inputs.checkpoint.reading import ARTEFACT_KEY
from compress.inputs.load import batch_size_for, load_model, open_images, preprocessing_of
from compress.measure.assess import metric_function
from compress.measure.cost import model_cost
from compress.measure.layers import (
    all_logits,
    check_gates,
    compare,
    custom_value,
    measure_layers,
    require_labels,
)
from compress.measure.paired import compare_logits
from compress.measure.speed import costs
from compress.network.baseline import Network, prepare
from compress.progress import Track, silent
from compress.result import Cost, CustomMetric, LayerErrors, LayerResult, Result, Versions
from compress.specs import build_model, needs_trust
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


def is_artefact(path: str | Path) -> bool:
    """Whether a path is a result folder or a safetensors file with this package's manifest."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir():
        return (path / MODEL_FILE).is_file()
    try:
        with safe_open(path, "pt") as opened:
            return ARTEFACT_KEY in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def recorded_settings(manifest: Manifest) -> dict[str, Any]:
    """What a result says of its images and gates, as defaults for measuring it again."""
    names = (
        "mean", "std", "resize", "crop", "max_drop", "max_layer_relative_mse", "min_agreement",
    )  # fmt: skip
    settings = manifest.settings
    return {name: settings[name] for name in names if settings.get(name) not in (None, [], ())}


def load_result(path: str, model: str, trust_code: bool) -> tuple[nn.Module, str]:
    """Load a result by a spec that the user gave, else by its own.

    Args:
        path: The result.
        model: The user's spec, or ``""``.
        trust_code: Whether the result's own spec may name code that is not torchvision's.

    Returns:
        The model and the spec it was built from.
    """
    if model:
        return load(path, model=build_model(model).module), model
    return load(path, trust_code=trust_code), read_manifest(path).model


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


def memory_format(manifest: Manifest) -> str:
    """The memory format that a result was saved with."""
    return "channels_last" if manifest.channels_last else "contiguous"


def _timed(model: nn.Module, example: Tensor, batch: int, form: str) -> Timed:
    images = example.expand(batch, *example.shape[1:]).contiguous()
    return Timed(batch, time_network({"model": model}, images, memory_format=form)["model"])


def verify_result(
    config: RunConfig, artefact: str, *, trust_code: bool = False, track: Track = silent
) -> Result:
    """Hold a result to its gates again, against the original, on any test set and machine.

    Args:
        config: The original's ``checkpoint`` and ``model``, ``test``, gates, preprocessing.
        artefact: The result.
        trust_code: As `load_result`.
        track: Progress.

    Returns:
        What a run says of its test set. Layers' errors are measured on the test images, and stand
        as those of the held-out set.

    Raises:
        ArtefactError: The checkpoint is not the one that the result was made from.
        CompressError: Something is missing or cannot be used.
    """
    manifest = read_manifest(artefact)
    spec = config.model or manifest.model
    if not config.checkpoint or not config.test or not spec:
        lacking = "checkpoint" if not config.checkpoint else "test" if not config.test else "model"
        raise ConfigError(f"No {lacking} given; pass --{lacking}.")
    _check_checkpoint(config, manifest)
    if not config.model and needs_trust(spec) and not trust_code:
        raise ArtefactError(
            f"The result names the code {spec!r}; pass --model to say what builds it, or "
            "--trust-code where you trust that code."
        )
    config = config.replace(model=spec)
    original, sha256, dtype, preprocessing = load_model(config)
    compressed = load(artefact, model=copy.deepcopy(original)).to(config.device)
    test = open_images(config.test, config, original, preprocessing)
    own = metric_function(config)
    if own is None:
        require_labels(test)
    example = test[0][0].unsqueeze(0).to(config.device)
    network = prepare(original.to(config.device), example)
    batch_size = batch_size_for(config, example)
    metric = compare(
        network.original, compressed, test, config, batch_size=batch_size, metric=own, track=track
    )
    loaded = batches(test, batch_size, config.workers)
    tracked = track(loaded, "layer errors", len(loaded))
    layers = _verified_layers(network, manifest, compressed, tracked)
    return Result(
        versions=Versions(__version__, torch.__version__, platform.python_version()),
        model=spec,
        config={"test": config.test, "device": config.device},
        source=config.checkpoint,
        source_sha256=sha256,
        model_fingerprint=sha256,
        test_fingerprint=test.fingerprint,
        dtype=manifest.dtype,
        layers=layers,
        test=metric,
        cost=costs(network, compressed, dtype, config, (memory_format(manifest),)),
        gates=check_gates(config, metric, layers),
        warnings=_test_warnings(manifest, test, metric.near_chance),
        folded=tuple(pair.norm for pair in network.folded),
    )


def _check_checkpoint(config: RunConfig, manifest: Manifest) -> None:
    try:
        found = sha256_file(config.checkpoint)
    except OSError:
        return  # reading it says what is wrong with it
    if found != manifest.source_sha256:
        raise ArtefactError(
            f"The result was made from the checkpoint with SHA-256 "
            f"{manifest.source_sha256[:16]}…, and {config.checkpoint} has {found[:16]}…. Pass the "
            "original that was compressed."
        )


def _verified_layers(
    network: Network, manifest: Manifest, compressed: nn.Module, tracked: Any
) -> tuple[LayerResult, ...]:
    replaced = {r.name: r for r in manifest.replacements}
    errors = {}
    if replaced:
        plain = copy.deepcopy(compressed).float()
        errors = measure_layers(network.model, plain, replaced, tracked)
    layers = []
    for site in network.sites:
        found = replaced.get(site.name)
        scheme, ranks = (found.scheme, found.ranks) if found else ("dense", ())
        cost = scheme_cost(site, scheme, ranks)
        alone, in_place = errors.get(site.name, (None, None))
        layers.append(
            LayerResult(
                name=site.name,
                kind=site.kind,
                shape=site.shape,
                scheme=scheme,
                ranks=ranks,
                full_rank=site.geometry.full_rank,
                reason="" if found else site.skip or "kept by the run",
                dense_macs=site.macs,
                macs=cost.macs,
                dense_params=site.params,
                params=cost.params,
                errors=LayerErrors(validation_alone=alone, validation_in_place=in_place),
            )
        )
    return tuple(layers)


def _test_warnings(manifest: Manifest, test: ImageSet, near_chance: bool) -> tuple[str, ...]:
    warnings = []
    if manifest.verified and manifest.verified.get("data") != test.fingerprint:
        warnings.append("These are other test images than those of the run.")
    if near_chance:
        warnings.append(
            "The original is hardly better than chance on the test images; check the order of the "
            "classes (--class-map) and the normalisation (--mean, --std)."
        )
    return tuple(warnings)
