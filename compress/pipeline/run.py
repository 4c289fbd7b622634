"""The main job, as its verbs in order; also as one call for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from compress.calibrate.statistics import without_unseen
from compress.choose import check_plan
from compress.config import WAYS, RunConfig, make_config
from compress.data import Given, as_images, split
from compress.errors import ConfigError, GateError, ModelError, PlanError
from compress.files import check_apart, check_output
from compress.fit.layers import Replaced
from compress.inputs.checkpoint.reading import listed
from compress.inputs.load import (
    Inputs,
    arity_of,
    image_folders,
    input_paths,
    load_network,
    weights_hash,
)
from compress.measure.assess import Assessment, Rewritten, assess
from compress.measure.progressive import Replacing, measure_progressive
from compress.measure.speed import Stopwatch, costs
from compress.network.baseline import Network, check_runs_in
from compress.network.chains import as_saved
from compress.network.narrowing import Cut
from compress.network.trial_cuts import is_faithful
from compress.pipeline.folder import save_result
from compress.pipeline.job import Job
from compress.pipeline.outcome import Compressed, Record
from compress.pipeline.places import check_files, check_places
from compress.pipeline.planning import choose
from compress.pipeline.recovery_stage import check_recoverable, recovered_in_run
from compress.pipeline.unfinished import Work, kept_on_failure
from compress.plan import Plan
from compress.progress import Track, silent
from compress.running.forward import evaluation_mode
from compress.running.memory_format import put_in_format
from compress.running.modules import dtype_of


def compress_network(
    inputs: Inputs,
    config: RunConfig,
    *,
    plan: Plan | None = None,
    track: Track = silent,
    work: Work | None = None,
) -> Compressed:
    """Compress a network: everything between reading the inputs and saving the result.

    Args:
        inputs: The trained network and its images.
        config: Rules, overrides, limits.
        plan: A plan to apply instead of choosing one.
        track: Progress.
        work: Filled in with what is done, for a caller that keeps it where a later stage fails.

    Raises:
        CompressError: Of the kind that says whose fault it is; see `compress.errors`.
    """
    work = work or Work()
    clock = work.clock
    with clock.stage("prepare"):
        job = Job.open(inputs, config, track)
        check_runs_in(job.network.original, job.network.example, inputs.dtype)
        if plan is not None:
            applied(plan, job)  # before any work that it might be in vain
        if config.recover is not None:
            check_recoverable(job)
    with clock.stage("read"):
        job = job.with_images()
    with clock.stage("calibrate"):
        schemes = _schemes(config, plan)
        calibration = job.calibrate(schemes)
        job = dataclasses.replace(job, network=without_unseen(job.network, calibration))
    work.calibrated(job, calibration, schemes)
    with clock.stage("plan"):
        plan = choose(job, calibration) if plan is None else applied(plan, job)
    work.plan = plan
    with clock.stage("fit"):
        fitted = job.fitter.with_held_out(job.fitter.fit(plan, calibration), calibration)
        check_faithful(job.network, fitted.narrowed)
        # Covariances may take as much memory as the refit does, and are not needed any more.
        del calibration
        work.before_refit()
        replaced = job.fitter.replace(fitted)
        work.cut = replaced.cut
    recovery = None
    if config.recover is not None:
        work.model = as_saved(replaced.model, job.inputs.dtype)  # should it fail
        with clock.stage("recover"):
            replaced, recovery = recovered_in_run(job, plan, replaced)
    rewritten = _finished(job, plan, replaced, work)
    with clock.stage("verify"), evaluation_mode(rewritten.final):
        assessed = assess(job.network, rewritten, job.inputs, job.yardstick)
    if config.progressive:
        with clock.stage("progressive"):
            assessed = _with_curve(assessed, job, rewritten)
    record = Record(job, rewritten, assessed, recovery)
    result = record.result(clock)
    # Only now: what is measured of the model must not depend on which format was faster.
    work.memory_format = rewritten.cost.memory_format
    put_in_format(rewritten.final, work.memory_format)
    manifest = record.manifest(result)
    made = Compressed(rewritten.final, plan, result, manifest, job.network, replaced.cut)
    if made.failed_gates:
        work.model = None  # not to be saved, whatever happens from here on
    return made


def check_faithful(network: Network, narrowed: Cut) -> None:
    """Raise `ModelError` where the forward does something else at the widths that were chosen."""
    graph = network.graph
    if graph is None or not narrowed.widths:
        return
    if is_faithful(narrowed.model, graph, network.example):
        return
    changed = listed([width.name for width in narrowed.widths])
    raise ModelError(
        f"The model's forward does something else once {changed} have fewer channels: it asks how "
        "many there are. Choose without taking out channels (--schemes output,input,two_sided,"
        "spatial), or leave those layers (--keep)."
    )


def _schemes(config: RunConfig, plan: Plan | None) -> tuple[str, ...]:
    """The schemes whose statistics are taken: those that the rule or the plan has in play."""
    schemes = config.schemes_in_play
    if plan is None:
        return schemes
    # With those that the rule had in play, so that the plan's calibration file serves.
    used = {choice.scheme for choice in plan.choices}
    if any(choice.width is not None for choice in plan.choices):
        used.update(plan.ways)
    return tuple(name for name in WAYS if name in used or name in schemes)


def _finished(job: Job, plan: Plan, replaced: Replaced, work: Work) -> Rewritten:
    """The rewritten model as it is saved, and what it costs."""
    final = work.model = as_saved(replaced.model, job.inputs.dtype)
    # Timing runs it as often as it likes: what its forward counts in buffers must not be saved.
    with work.clock.stage("latency"), evaluation_mode(final):
        stopwatch = Stopwatch.of(job.config, work.clock.total)
        cost = costs(job.network, final, job.inputs.dtype, stopwatch)
    return Rewritten(plan, replaced, final, cost)


def _with_curve(assessed: Assessment, job: Job, rewritten: Rewritten) -> Assessment:
    """Add what the network gives after each further layer is replaced."""
    replaced = rewritten.replaced
    names = [layer.name for layer in assessed.layers if layer.rewritten or layer.refitted]
    replacing = Replacing(replaced.model, tuple(names), replaced.cut)
    curve = measure_progressive(job.network, replacing, job.inputs, job.yardstick)
    return dataclasses.replace(assessed, progressive=curve)


def applied(plan: Plan, job: Job) -> Plan:
    """Fit a plan, perhaps edited, to the network that it is applied to.

    Raises:
        PlanError: It does not fit.
    """
    fitting = check_plan(plan, job.network.sites, job.network.channels)
    return dataclasses.replace(fitting, model=job.inputs.spec, source_sha256=job.inputs.sha256)


def choose_plan(config: RunConfig, *, track: Track = silent) -> tuple[Plan, tuple[str, ...]]:
    """Calibrate and choose, and rewrite nothing.

    Returns:
        The plan that `run` would carry out, and what the user should know.

    Raises:
        CompressError: As `run`.
    """
    check_files(config)
    job = Job.open(load_network(config), config, track).with_images()
    calibration = job.calibrate(config.schemes_in_play)
    job = dataclasses.replace(job, network=without_unseen(job.network, calibration))
    warnings = (*job.inputs.warnings, *job.network.warnings)
    return choose(job, calibration), warnings


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
        CompressError: Anything else that stops it. Where the work was done before that, a note to
            it says where that is kept; see `compress.pipeline.unfinished`.
    """
    if not config.output:
        raise ConfigError("No output given; pass --output DIR for the result folder.")
    check_apart(config.output, input_paths(config), image_folders(config))
    check_output(config.output, force=config.force)
    check_places(config)
    with kept_on_failure(config) as work:
        with work.clock.stage("read"):
            inputs = load_network(config)
        if plan is not None:
            check_source(plan, inputs)
        compressed = compress_network(inputs, config, plan=plan, track=track, work=work)
        save_result(compressed, config, inputs.test)
    if compressed.failed_gates:
        raise GateError(
            f"{'; '.join(compressed.failed_gates)}. No model was saved; the report is in "
            f"{config.output}. Loosen the limit, or give the rule more room (a lower --threshold, "
            "a larger budget)."
        )
    return compressed


def compress_model(
    model: nn.Module,
    images: Given,
    *,
    test: Given | None = None,
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
    check_places(config)
    given = as_images(images, arity_of(model))
    inputs = Inputs(
        model=model,
        spec=spec,
        source="",
        sha256=weights_hash(model),
        dtype=dtype_of(model.parameters()),
        split=split(given, config.calibration_images, config.seed),
        test=None if test is None else as_images(test, arity_of(model)),
        images=given,
    )
    with kept_on_failure(config) as work:
        compressed = compress_network(inputs, config, track=track, work=work)
        if config.output:
            save_result(compressed, config, inputs.test)
    if compressed.failed_gates:
        raise GateError(f"{'; '.join(compressed.failed_gates)}.")
    return compressed
