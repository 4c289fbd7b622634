"""Holding a result to its gates again, against the original it came from."""

from __future__ import annotations

import copy
import platform
from typing import Any

import torch
from torch import nn

from compress import __version__
from compress.artefact.manifest import Manifest, memory_format, read_manifest
from compress.artefact.model import load
from compress.choose import scheme_cost
from compress.config import RunConfig
from compress.data import ImageSet, batches
from compress.errors import ArtefactError, ConfigError
from compress.files import sha256_file
from compress.inputs.functions import metric_function
from compress.inputs.load import batch_size_for, load_model, open_images
from compress.measure.accuracy import compare, require_labels
from compress.measure.gates import check_gates
from compress.measure.layers import measure_layers
from compress.measure.speed import costs
from compress.network.baseline import Network, prepare
from compress.progress import Track, silent
from compress.result import LayerErrors, LayerResult, Result, Versions
from compress.specs import needs_trust


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
