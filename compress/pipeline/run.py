"""The main job, as its verbs in order; also as one call for programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from compress.calibrate.collect import calibrate
from compress.calibrate.file import CalibrationKey, read_calibration, write_calibration
from compress.calibrate.statistics import Calibration, without_unseen
from compress.choose import check_plan, make_plan
from compress.choose.by_time.plan import timed_plan
from compress.config import RunConfig, make_config
from compress.data import ImageSet, as_images, batches, split
from compress.errors import ArtefactError, ConfigError, GateError, PlanError
from compress.files import check_apart, check_output
from compress.fit.layers import fit_layers, replace_layers
from compress.inputs.functions import loss_function
from compress.inputs.load import Inputs, batch_size_for, input_paths, load_network, weights_hash
from compress.linalg.schemes import SCHEME_NAMES
from compress.measure.assess import assess
from compress.measure.speed import costs
from compress.network.baseline import Network, check_runs_in, prepare
from compress.network.chains import as_saved
from compress.pipeline.folder import save_result
from compress.pipeline.outcome import Clock, Compressed, make_manifest, make_result
from compress.pipeline.target_drop import searched_plan
from compress.plan import Plan
from compress.progress import Track, silent
from compress.running.forward import evaluation_mode
from compress.running.memory_format import put_in_format


def compress_network(
    inputs: Inputs,
    config: RunConfig,
    *,
    plan: Plan | None = None,
    track: Track = silent,
    clock: Clock | None = None,
) -> Compressed:
    """Compress a network: everything between reading the inputs and saving the result.

    Args:
        inputs: The trained network and its images.
        config: Rules, overrides, gates.
        plan: A plan to apply instead of choosing one.
        track: Progress.
        clock: Filled with the seconds of each stage.

    Raises:
        CompressError: Of the kind that says whose fault it is; see `compress.errors`.
    """
    clock = clock or Clock()
    with clock.stage("prepare"):
        network = prepare(inputs.model.to(config.device), inputs.example.to(config.device))
        check_runs_in(network.original, network.example, inputs.dtype)
    batch_size = batch_size_for(config, inputs.example)
    with clock.stage("calibrate"):
        schemes = config.schemes_in_play
        if plan is not None:
            # With those that the rule had in play, so that the plan's calibration file serves.
            used = {c.scheme for c in plan.choices}
            schemes = tuple(s for s in SCHEME_NAMES if s in used or s in schemes)
        calibration = calibrated(network, inputs, config, schemes, batch_size, track)
        network = without_unseen(network, calibration)
    with clock.stage("plan"):
        if plan is not None:
            plan = check_plan(plan, network.sites)
        else:
            plan = planned(network, inputs, calibration, config, batch_size, track)
        plan = dataclasses.replace(plan, model=inputs.spec, source_sha256=inputs.sha256)
    with clock.stage("fit"):
        fitted = fit_layers(network, plan, calibration, config, inputs.split, batch_size, track)
        # Covariances take as much memory as the refit does, and are not needed any more.
        calibration.statistics.clear()
        replaced = replace_layers(network, fitted, config, inputs.split, batch_size, track)
    final = as_saved(replaced.model, inputs.dtype)
    # Timing runs it as often as it likes: what its forward counts in buffers must not be saved.
    with clock.stage("latency"), evaluation_mode(final):
        cost = costs(network, final, inputs.dtype, config)
    put_in_format(final, cost.memory_format)
    with clock.stage("verify"), evaluation_mode(final):
        assessed = assess(network, plan, replaced, final, cost, inputs, config, batch_size, track)
    result = make_result(inputs, config, network, plan, calibration, cost, assessed, clock)
    manifest = make_manifest(inputs, config, network, plan, calibration, result)
    return Compressed(final, plan, result, manifest, network)


def planned(
    network: Network,
    inputs: Inputs,
    calibration: Calibration,
    config: RunConfig,
    batch_size: int,
    track: Track,
) -> Plan:
    """Choose a plan by the configuration's rule."""
    if config.rule == "target_drop":
        return searched_plan(network, inputs, calibration, config, batch_size, track)
    if config.rule == "latency":
        return timed_plan(network, calibration, config, inputs.dtype, track)
    return make_plan(network.model, network.sites, calibration, config, track)


def calibrated(
    network: Network,
    inputs: Inputs,
    config: RunConfig,
    schemes: tuple[str, ...],
    batch_size: int,
    track: Track,
) -> Calibration:
    """Statistics of the fit images that some schemes need: from the file that fits, or measured."""
    fit = inputs.split.fit
    key = CalibrationKey(
        inputs.sha256,
        fit.fingerprint,
        {
            "metric": config.metric,
            "seed": config.seed,
            "samples_per_dimension": config.samples_per_dimension,
            "statistics": sorted((*schemes, "pooled") if config.pools else schemes),
            "loss_fn": config.loss_fn,
        },
    )
    path = Path(config.calibration) if config.calibration else None
    if path is not None and path.exists():
        return read_calibration(path, key)
    if path is not None and not path.parent.is_dir():
        raise ArtefactError(
            f"The calibration {path} cannot be written: there is no folder {path.parent}; make it, "
            "or pass another file."
        )
    loaded = batches(fit, batch_size, config.workers)
    calibration = calibrate(
        network.model,
        network.sites,
        track(loaded, "calibrate", len(loaded)),
        len(fit),
        schemes=schemes,
        weigh=config.metric == "loss",
        pool=config.pools,
        loss=loss_function(config),
        samples_per_dimension=config.samples_per_dimension,
        seed=config.seed,
        memory_format=network.memory_format,
    )
    calibration.data_fingerprint = fit.fingerprint
    calibration.model_fingerprint = inputs.sha256
    if path is not None:
        write_calibration(path, calibration, key)
    return calibration


def choose_plan(config: RunConfig, *, track: Track = silent) -> tuple[Plan, tuple[str, ...]]:
    """Calibrate and choose, and rewrite nothing.

    Returns:
        The plan that `run` would carry out, and what the user should know.

    Raises:
        CompressError: As `run`.
    """
    inputs = load_network(config)
    network = prepare(inputs.model.to(config.device), inputs.example.to(config.device))
    batch_size = batch_size_for(config, inputs.example)
    calibration = calibrated(network, inputs, config, config.schemes_in_play, batch_size, track)
    network = without_unseen(network, calibration)
    plan = planned(network, inputs, calibration, config, batch_size, track)
    warnings = (*inputs.warnings, *network.warnings, *calibration.warnings)
    return dataclasses.replace(plan, model=inputs.spec, source_sha256=inputs.sha256), warnings


def check_source(plan: Plan, inputs: Inputs) -> None:
    """Raise `PlanError` where a plan was made for another checkpoint."""
    if plan.source_sha256 and plan.source_sha256 != inputs.sha256:
        raise PlanError(
            f"The plan was made for the checkpoint with SHA-256 {plan.source_sha256[:16]}…, and "
            f"{inputs.source or 'the model given'} has {inputs.sha256[:16]}…. Pass the checkpoint "
            "it was made for, or make a new plan."
        )


def run(config: RunConfig, *, plan: Plan | None = None, track: Track = silent) -> Compressed:
    """The main job of the command line: read, compress, verify, save, reload, report.

    Raises:
        GateError: A gate failed; the report stands in the output folder, a model does not.
        CompressError: Anything else that stops it; nothing is left behind.
    """
    if not config.output:
        raise ConfigError("No output given; pass --output DIR for the result folder.")
    check_output(config.output, force=config.force)
    check_apart(config.output, input_paths(config))
    clock = Clock()
    with clock.stage("read"):
        inputs = load_network(config)
    if plan is not None:
        check_source(plan, inputs)
    compressed = compress_network(inputs, config, plan=plan, track=track, clock=clock)
    save_result(compressed, config, inputs.test)
    if compressed.failed_gates:
        raise GateError(
            f"{' '.join(compressed.failed_gates)} No model was saved; the report is in "
            f"{config.output}. Loosen the limit, or give the rule more room (a lower --threshold, "
            "a larger budget)."
        )
    return compressed


def compress_model(
    model: nn.Module,
    images: ImageSet | Dataset[Any] | Tensor | tuple[Tensor, Tensor],
    *,
    test: ImageSet | Dataset[Any] | Tensor | tuple[Tensor, Tensor] | None = None,
    spec: str = "",
    track: Track = silent,
    **settings: Any,
) -> Compressed:
    """Compress a model in one call, as ``compress run`` does.

    Args:
        model: A trained network; it is left as it was.
        images: What to calibrate on: inputs as the network takes them, ``[N, C, H, W]``, with or
            without labels; a dataset of such inputs; or an `ImageSet`.
        test: Labelled images to verify on; without them the result is unverified.
        spec: How `compress.load` can rebuild the architecture; without one it takes ``model=``.
        track: Progress.
        **settings: Any field of `RunConfig`, such as ``macs=0.5``; with ``output`` the result
            folder is written, gates included.

    Returns:
        The compressed model with its plan and its measured result.

    Raises:
        GateError: A gate failed (``max_drop``, ``min_agreement``, ...).
        CompressError: Anything else that stops it.

    Example:
        >>> compressed = compress.compress_model(model, images, test=test, macs=0.5)
        >>> compressed.model
    """
    config = make_config({**settings, "model": spec})
    if config.output:
        check_output(config.output, force=config.force)
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    given = as_images(images)
    inputs = Inputs(
        model=model,
        spec=spec,
        source="",
        sha256=weights_hash(model),
        dtype=max(set(dtypes), key=dtypes.count) if dtypes else torch.float32,
        split=split(given, config.calibration_images, config.seed),
        test=None if test is None else as_images(test),
    )
    compressed = compress_network(inputs, config, track=track)
    if config.output:
        save_result(compressed, config, inputs.test)
    if compressed.failed_gates:
        raise GateError(" ".join(compressed.failed_gates))
    return compressed
