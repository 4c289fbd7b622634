"""Holding a result to its gates again, against the original it came from."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.artefact.manifest import Manifest, read_manifest
from compress.artefact.model import rebuilt
from compress.artefact.runtime import Runtime, read_runtime
from compress.choose import scheme_cost
from compress.choose.choices import lossless_rank, narrowed_site
from compress.config import RunConfig
from compress.data import ImageSet, Loader
from compress.data.held import hold
from compress.errors import ArtefactError, ConfigError
from compress.inputs.functions import metric_function
from compress.inputs.load import batch_size_for, load_model, open_images, source_sha256
from compress.measure.accuracy import Yardstick, require_labels
from compress.measure.assess import recurrent_result
from compress.measure.by_task import require_targets
from compress.measure.layers import measure_layers
from compress.measure.speed import Stopwatch, costs
from compress.network.baking import copied
from compress.network.baseline import Network, prepare
from compress.network.narrowing import Cut, kept_in
from compress.pipeline.evidence import evidence_of
from compress.pipeline.outcome import current_versions, limits_of
from compress.pipeline.pictures import Pair
from compress.pipeline.places import check_runtime
from compress.plan import DENSE, NARROW
from compress.progress import Track, silent
from compress.report import judged
from compress.result import EndMetric, LayerErrors, LayerResult, Result
from compress.running.structure import batched, placed
from compress.tasks import TaskMeasure
from compress.trust import require_trusted_model


@dataclass(frozen=True)
class Verified:
    """A result that was held to its limits again.

    Attributes:
        result: What was measured.
        pair: The original and the compressed network.
        test: What they were measured on.
    """

    result: Result
    pair: Pair
    test: ImageSet


def verify_result(
    config: RunConfig, artefact: str, *, trust_code: bool = False, track: Track = silent
) -> Verified:
    """Hold a result to its limits again, against the original, on any test set and machine.

    Args:
        config: The original's ``checkpoint`` and ``model``, ``test``, limits, preprocessing.
        artefact: The result.
        trust_code: As `load_result`.
        track: Progress.

    Returns:
        What a run says of its test set, and what it is said of. Layers' errors are measured on
        the test images, and stand as those of the held-out set.

    Raises:
        ArtefactError: The checkpoint is not the one that the result was made from.
        CompressError: Something is missing or cannot be used.
    """
    begun = time.perf_counter()
    check_runtime(config)
    manifest = read_manifest(artefact)
    config = with_model(config, manifest, ("checkpoint", "test", "model"), trust_code=trust_code)
    original, sha256, dtype, preprocessing = load_model(config)
    compressed = rebuilt(artefact, copied(original)).to(config.device)
    test = open_images(config.test, config, original, preprocessing)
    metric = metric_function(config)
    if isinstance(metric, TaskMeasure):
        require_targets(metric.task, test)
    elif metric is None:
        require_labels(test)
    example = placed(batched(test[0][0]), config.device)
    evidence = evidence_of([test], example, config)
    network = prepare(original.to(config.device), example, evidence)
    loader = Loader(batch_size_for(config, example), config.workers)
    yardstick = Yardstick(loader, metric, track, network.reading)
    test = hold(test, loader, track)
    found = yardstick.compare(network.original, compressed, test)
    runtime = read_runtime(artefact)
    layers = verified_layers(network, manifest, compressed, tracked(yardstick, test))
    so_far = time.perf_counter() - begun
    stopwatch = Stopwatch.of(config, so_far, (runtime.memory_format,))
    cost = costs(network, compressed, dtype, stopwatch)
    warnings = (*_runtime_warnings(runtime), *cost.refused, *_test_warnings(manifest, test, found))
    result = Result(
        versions=current_versions(),
        model=config.model,
        config={"test": config.test, "device": config.device, "no_latency": config.no_latency},
        source=config.checkpoint,
        source_sha256=sha256,
        model_fingerprint=sha256,
        test_fingerprint=test.fingerprint,
        dtype=manifest.dtype,
        layers=layers,
        test=found,
        cost=cost,
        warnings=warnings,
        folded=tuple(pair.norm for pair in network.folded),
        outputs=network.reading.why,
    )
    pair = Pair(network.original, compressed, network.reading)
    return Verified(judged(result, limits_of(config)), pair, test)


def tracked(yardstick: Yardstick, images: ImageSet) -> Iterable[tuple[Any, Any]]:
    """The batches that layers' errors are measured on, with progress."""
    loaded = yardstick.loader.batches(images)
    return yardstick.track(loaded, "layer errors", len(loaded))


def with_model(
    config: RunConfig, manifest: Manifest, needed: Sequence[str], *, trust_code: bool
) -> RunConfig:
    """Return the configuration with the original's model named.

    Args:
        config: What the user says.
        manifest: What the result says.
        needed: Settings that there has to be something in, among them ``"model"``.
        trust_code: As `load_result`.

    Raises:
        ConfigError: Something needed is not named.
        ArtefactError: The checkpoint is another one, or only the result names code.
    """
    spec = config.model or manifest.model
    for name in needed:
        if not (spec if name == "model" else getattr(config, name)):
            raise ConfigError(f"No {name} given; pass --{name}.")
    if not config.model and not trust_code:
        require_trusted_model(spec, "The result", ArtefactError)
    config = config.replace(model=spec)
    _check_checkpoint(config, manifest)
    return config


def _check_checkpoint(config: RunConfig, manifest: Manifest) -> None:
    try:
        found = source_sha256(config)
    except OSError:
        return  # reading it says what is wrong with it
    if found != manifest.source_sha256:
        raise ArtefactError(
            f"The result was made from the checkpoint with SHA-256 "
            f"{manifest.source_sha256[:16]}…, and {config.checkpoint} has {found[:16]}…. Pass the "
            "original that was compressed."
        )


def verified_layers(
    network: Network,
    manifest: Manifest,
    compressed: nn.Module,
    batches: Iterable[tuple[Any, Any]],
) -> tuple[LayerResult, ...]:
    """What a result did to each layer, and the errors of those that can be compared.

    Args:
        network: The dense baseline.
        manifest: What the result says of itself.
        compressed: The network.
        batches: What errors are measured on.
    """
    replaced = {r.name: r for r in manifest.replacements}
    narrow = {w.name: (w.inputs, w.outputs) for w in manifest.widths}
    known = {w.name: kept_in(w, network.model.get_submodule(w.name)) for w in manifest.widths}
    kept = {name: found for name, found in known.items() if found is not None}
    element = next(compressed.parameters()).element_size()
    errors = {}
    sites = {site.name: site for site in network.sites}
    names = [
        name for name in sites
        if name in kept or (name in replaced and name not in narrow)
    ]  # fmt: skip
    if names:
        plain = copy.deepcopy(compressed).float()
        cut = Cut(network.model, sites, kept)
        errors = measure_layers(network.model, plain, names, batches, cut)
    layers = []
    for site in network.sites:
        found = replaced.get(site.name)
        width = narrow.get(site.name)
        whole = DENSE if width is None else NARROW
        scheme, ranks = (found.scheme, found.ranks) if found else (whole, ())
        cost = scheme_cost(site if width is None else narrowed_site(site, width), scheme, ranks)
        alone, in_place = errors.get(site.name, (None, None))
        layers.append(
            LayerResult(
                name=site.name,
                kind=site.kind,
                shape=site.shape,
                scheme=scheme,
                ranks=ranks,
                full_rank=lossless_rank(site, scheme),
                reason="" if found or width else site.skip or "kept by the run",
                dense_macs=site.macs,
                macs=cost.macs,
                dense_params=site.params,
                params=cost.params,
                dense_bytes=site.params * element,
                bytes=cost.params * element,
                errors=LayerErrors(validation_alone=alone, validation_in_place=in_place),
                width=width,
            )
        )
    layers += [recurrent_result(layer, element) for layer in network.recurrent]
    return tuple(layers)


def _runtime_warnings(runtime: Runtime) -> tuple[str, ...]:
    return (runtime.problem,) if runtime.problem else ()


def _test_warnings(manifest: Manifest, test: ImageSet, found: EndMetric) -> tuple[str, ...]:
    warnings = []
    if manifest.verified and manifest.verified.get("data") != test.fingerprint:
        warnings.append("These are other test images than those of the run.")
    if found.near_chance:
        warnings.append(
            "The original is hardly better than chance on the test images; check the order of the "
            "classes (--class-map) and the normalisation (--mean, --std)."
        )
    return tuple(warnings)
