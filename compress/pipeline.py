"""The main job, as its verbs in order; also as one call for programs."""

from __future__ import annotations

import copy
import dataclasses
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from compress import __version__
from compress.artefact import MODEL_FILE, Manifest, Replacement, load, save, versions
from compress.assess import Assessment, assess
from compress.calibrate import Calibration, calibrate
from compress.calibration_file import CalibrationKey, read_calibration, write_calibration
from compress.choose import Budgets, check_plan, make_plan
from compress.config import RunConfig, make_config
from compress.data import ImageSet, as_images, batches, split
from compress.errors import ArtefactError, ConfigError, GateError, ModelError, PlanError
from compress.files import atomic_folder, check_output, write_atomically
from compress.inputs import Inputs, batch_size_for, load_network, weights_hash
from compress.network import Network, prepare
from compress.plan import Choice, Plan
from compress.progress import Track, silent
from compress.replace import fit_plan
from compress.report import build_report, gate_sentence, write_report
from compress.result import Result, Versions
from compress.search import cheapest_within_drop
from compress.sites import evaluation_mode, run_model
from compress.verify import all_logits, compare, require_labels


@dataclass
class Clock:
    """Seconds by stage, for the report."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Compressed:
    """What the main job gives back.

    Attributes:
        model: The compressed network of plain layers, in the dtype of the source.
        plan: What was done to each layer and why.
        result: Everything measured.
        manifest: How to rebuild the model.
        network: The dense baseline.
    """

    model: nn.Module
    plan: Plan
    result: Result
    manifest: Manifest
    network: Network

    @property
    def failed_gates(self) -> tuple[str, ...]:
        """One sentence for each gate that failed."""
        return tuple(
            gate_sentence(g.name, g.limit, g.value, g.passed, g.where)
            for g in self.result.gates
            if not g.passed
        )


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
    batch_size = batch_size_for(config, inputs.example)
    with clock.stage("calibrate"):
        schemes = config.schemes_in_play
        if plan is not None:
            schemes = tuple(sorted({c.scheme for c in plan.choices if c.rewritten}))
        calibration = calibrated(network, inputs, config, schemes, batch_size, track)
    with clock.stage("plan"):
        if plan is not None:
            plan = check_plan(plan, network.sites)
        elif config.rule == "target_drop":
            plan = searched_plan(network, inputs, calibration, config, batch_size, track)
        else:
            plan = make_plan(network.model, network.sites, calibration, config)
        plan = dataclasses.replace(plan, model=inputs.spec, source_sha256=inputs.sha256)
    with clock.stage("fit"):
        replaced = fit_plan(network, plan, calibration, config, inputs.split, batch_size, track)
    final = copy.deepcopy(replaced.model).to(inputs.dtype)
    with clock.stage("verify"):
        assessed = assess(network, plan, replaced, final, inputs, config, batch_size, track)
    result = _result(inputs, config, network, plan, calibration, assessed, clock)
    manifest = _manifest(inputs, config, network, plan, calibration, result)
    return Compressed(final, plan, result, manifest, network)


def searched_plan(
    network: Network,
    inputs: Inputs,
    calibration: Calibration,
    config: RunConfig,
    batch_size: int,
    track: Track,
) -> Plan:
    """The cheapest plan whose validation accuracy falls by at most ``target_drop`` points.

    Raises:
        DataError: There are no labelled validation images to measure it on.
    """
    images = inputs.split.validation
    require_labels(images)
    target = config.rule_value or 0.0
    loaded = batches(images, batch_size, config.workers)
    before = all_logits(network.original, loaded, "search: original", track)

    def plan_of(choices: list[Choice]) -> Plan:
        return Plan("target_drop", target, config.metric, tuple(choices))

    def drop(choices: list[Choice]) -> float:
        replaced = fit_plan(
            network, plan_of(choices), calibration, config, inputs.split, batch_size, track
        )
        metric = compare(
            network.original, replaced.model, images, config,
            batch_size=batch_size, describe="search", before_logits=before, track=track,
        )  # fmt: skip
        return metric.drop or 0.0

    budgets = Budgets(network.model, network.sites, calibration, config)
    found = cheapest_within_drop(budgets, drop, target)
    why = f"cheapest found that loses at most {target:g} points on the validation images"
    choices = [
        dataclasses.replace(c, reason=why if c.rewritten else c.reason) for c in found.choices
    ]
    return plan_of(choices)


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
            "schemes": sorted(schemes),
            "loss_fn": config.loss_fn,
        },
    )
    path = Path(config.calibration) if config.calibration else None
    if path is not None and path.exists():
        return read_calibration(path, key)
    loaded = batches(fit, batch_size, config.workers)
    calibration = calibrate(
        network.model,
        network.sites,
        track(loaded, "calibrate", len(loaded)),
        len(fit),
        schemes=schemes,
        weigh=config.metric == "loss",
        loss=loss_function(config),
        samples_per_dimension=config.samples_per_dimension,
        seed=config.seed,
    )
    calibration.data_fingerprint = fit.fingerprint
    calibration.model_fingerprint = inputs.sha256
    if path is not None:
        write_calibration(path, calibration, key)
    return calibration


def loss_function(config: RunConfig) -> Any:
    """The user's own loss ``(outputs, labels) -> summed loss``, or None for sampled labels."""
    if not config.loss_fn:
        return None
    from compress.models import import_function  # only where it is asked for

    return import_function(config.loss_fn, ModelError)


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
    plan = make_plan(network.model, network.sites, calibration, config)
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
    check_output(config.output, config.force)
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


def save_result(compressed: Compressed, config: RunConfig, test: ImageSet | None = None) -> None:
    """Write a result folder: model, reports, plan and configuration, all or nothing.

    Raises:
        ArtefactError: The folder cannot be written, or the model read back differs.
    """
    with atomic_folder(config.output, config.force) as folder:
        if not compressed.failed_gates:
            save(compressed.model, compressed.manifest, folder / MODEL_FILE)
            check_reload(compressed, folder / MODEL_FILE)
        write_atomically(folder / "plan.json", compressed.plan.to_json())
        write_atomically(folder / "config.toml", config.to_toml())
        report = build_report(compressed.result)
        write_report(report, folder, flip_thumbnails(compressed.result, test))


def check_reload(compressed: Compressed, path: Path) -> None:
    """Load a saved model and compare it with the one in memory, bit by bit.

    Raises:
        ArtefactError: They differ.
    """
    reloaded = load(path, model=copy.deepcopy(compressed.network.original).cpu())
    example = compressed.network.example
    reference = next(compressed.model.parameters())
    images = example.to(reference)
    with torch.no_grad(), evaluation_mode(compressed.model):
        expected = run_model(compressed.model, images)
        found = run_model(reloaded.to(reference.device), images)
    own, loaded = compressed.model.state_dict(), reloaded.state_dict()
    same = own.keys() == loaded.keys() and all(torch.equal(own[k], loaded[k]) for k in own)
    if not same or not torch.equal(expected, found):
        raise ArtefactError(
            "The saved model, read back, does not equal the one in memory; nothing was kept. "
            "This is a defect of compress or of the disk: please report it."
        )


def flip_thumbnails(result: Result, images: ImageSet | None, most: int = 48) -> dict[int, bytes]:
    """Small PNG pictures of the test images whose verdict changed, by index."""
    if images is None or result.test is None:
        return {}
    from compress.vision import thumbnail

    flips = (*result.test.to_wrong[: most // 2], *result.test.to_right[: most // 2])
    return {flip.index: thumbnail(images.raw(flip.index)) for flip in flips}


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
        check_output(config.output, config.force)
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


# Settings that are paths or decide only speed: equal models must come out as equal bytes.
_UNRECORDED = {
    "checkpoint", "model", "data", "test", "output", "device", "threads", "batch_size", "workers",
    "calibration", "force", "class_map",
}  # fmt: skip


def _manifest(
    inputs: Inputs,
    config: RunConfig,
    network: Network,
    plan: Plan,
    calibration: Calibration,
    result: Result,
) -> Manifest:
    settings = dataclasses.asdict(config)
    sites = {site.name: site for site in network.sites}
    test = result.test
    verified = {} if test is None else {
        "images": test.images, "top1_before": test.top1_before, "top1_after": test.top1_after,
        "agreement": test.agreement, "data": result.test_fingerprint,
    }  # fmt: skip
    return Manifest(
        model=inputs.spec,
        source_sha256=inputs.sha256,
        dtype=str(inputs.dtype).removeprefix("torch."),
        unpacked=network.unpacked,
        folded=tuple((pair.layer, pair.norm) for pair in network.folded),
        replacements=tuple(
            Replacement(c.name, sites[c.name].aliases, c.scheme, c.ranks)
            for c in plan.choices
            if c.rewritten
        ),
        settings={k: v for k, v in settings.items() if k not in _UNRECORDED and v is not None},
        calibration={
            "data": calibration.data_fingerprint,
            "images": calibration.images,
            "seed": config.seed,
        },
        verified=verified,
        versions=versions(),
    )


def _result(
    inputs: Inputs,
    config: RunConfig,
    network: Network,
    plan: Plan,
    calibration: Calibration,
    assessed: Assessment,
    clock: Clock,
) -> Result:
    warnings = [*inputs.warnings, *network.warnings, *calibration.warnings, *assessed.warnings]
    return Result(
        versions=Versions(__version__, torch.__version__, platform.python_version()),
        model=inputs.spec,
        config={k: v for k, v in dataclasses.asdict(config).items() if v is not None},
        source=inputs.source,
        source_sha256=inputs.sha256,
        model_fingerprint=inputs.sha256,
        data_fingerprint=calibration.data_fingerprint,
        test_fingerprint="" if inputs.test is None else inputs.test.fingerprint,
        dtype=str(inputs.dtype).removeprefix("torch."),
        split=inputs.split_record(),
        calibration_images=calibration.images,
        rule=plan.rule,
        value=plan.value,
        metric=plan.metric,
        layers=assessed.layers,
        validation=assessed.validation,
        test=assessed.test,
        cost=assessed.cost,
        gates=assessed.gates,
        warnings=tuple(warnings),
        folded=tuple(pair.norm for pair in network.folded),
        rank_correlation=assessed.rank_correlation,
        seconds=clock.seconds,
    )
