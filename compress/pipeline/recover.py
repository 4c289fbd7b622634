"""``compress recover``: a result that learns from its original, saved as a result of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.artefact.manifest import Manifest, read_manifest, result_file
from compress.artefact.model import rebuilt, save
from compress.artefact.runtime import Runtime, read_runtime, write_runtime
from compress.config import RunConfig
from compress.data import Split
from compress.errors import ArtefactError, ConfigError, GateError
from compress.files import (
    MODEL_FILE,
    RECOVERY_FILE,
    UNFINISHED,
    atomic_folder,
    atomic_update,
    check_apart,
    check_output,
    sha256_file,
    write_atomically,
)
from compress.inputs.load import (
    Inputs,
    image_folders,
    input_paths,
    load_model,
    open_images,
)
from compress.measure.assess import comparable
from compress.measure.speed import Stopwatch, costs
from compress.network.baking import copied
from compress.network.chains import as_saved
from compress.pipeline.folder import pictures_of
from compress.pipeline.job import Job
from compress.pipeline.outcome import Clock, current_versions, limits_of, verified_by
from compress.pipeline.pictures import Pair
from compress.pipeline.places import check_places
from compress.pipeline.recovery_stage import (
    Recovering,
    Wish,
    kept_by_user,
    recorded,
    task_of,
    value_of,
)
from compress.pipeline.reloading import check_reload
from compress.pipeline.unfinished import unfinished_folder
from compress.pipeline.verify import tracked, verified_layers, with_model
from compress.plan import Plan, read_plan
from compress.progress import Track, silent
from compress.recover import Course, Division, Keep, State, divided
from compress.recover.store import read_state, write_state
from compress.report import build_report, gate_sentence, judged, write_report
from compress.result import Recovery, Result
from compress.running.forward import evaluation_mode
from compress.running.memory_format import put_in_format

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Request:
    """What is to be recovered, and how.

    Attributes:
        artefact: The result.
        wish: How long, and as what.
        resume: Whether to go on with what an earlier one left.
        trust_code: As `load_result`.
    """

    artefact: str
    wish: Wish
    resume: bool = False
    trust_code: bool = False


@dataclass(frozen=True)
class _Opened:
    """A result with its original and their images."""

    job: Job
    manifest: Manifest
    compressed: nn.Module
    request: Request


def recover_result(config: RunConfig, request: Request, track: Track = silent) -> Result:
    """Let a result learn from its original on images without labels, and save what comes of it.

    Args:
        config: The original's ``checkpoint`` and ``model``, ``data``, ``output``, perhaps ``test``,
            limits, preprocessing.
        request: What is to be recovered.
        track: Progress.

    Returns:
        What the report says.

    Raises:
        ArtefactError: The result or the checkpoint cannot be used, or the output not be written.
        CompressError: Something else is missing or cannot be used.
    """
    clock = Clock()
    with clock.stage("read"):
        opened = _opened(config, request, track)
    job, manifest = opened.job, opened.manifest
    config = job.config
    split = job.inputs.split
    kept = kept_by_user(job.network, manifest.settings, _plan(request.artefact))
    task = task_of(job, Division(split.fit, split.validation), kept, request.wish.goal)
    recovering = Recovering(opened.compressed, task, request.wish, job.inputs.dtype)
    state = _State(opened)
    before = value_of(job, opened.compressed)
    with clock.stage("recover"):
        course = state.resumed(recovering) if request.resume else recovering.begin()
        keep = state.keeper(course, recovering)
        keep(course.state, course.tensors())
        model = recovering.run(course, keep)
    final = as_saved(model, job.inputs.dtype)
    recovery = recorded(course, request.wish, before)
    result = _measured(opened, final, recovery, clock)
    _save(opened, final, result)
    broken = [gate_sentence(gate) for gate in result.gates if not gate.passed]
    if broken:
        raise GateError(
            f"{'; '.join(broken)}. No model was saved; the report is in {config.output}. What was "
            f"learned is in {unfinished_folder(config.output)}: repeat the command with --resume, "
            "--force and other limits to have it measured again."
        )
    state.forget()
    return result


def _plan(artefact: str) -> Plan | None:
    """The plan of a result folder; None where it has none, as a model file by itself."""
    path = Path(artefact) / PLAN_FILE
    return read_plan(path) if path.is_file() else None


def _opened(config: RunConfig, request: Request, track: Track) -> _Opened:
    """Read and check everything before any work."""
    manifest = read_manifest(request.artefact)
    needed = ("checkpoint", "data", "model", "output")
    config = with_model(config, manifest, needed, trust_code=request.trust_code)
    if not manifest.replacements and not manifest.widths:
        raise ConfigError(
            f"No layer of {request.artefact} was rewritten, so that there is nothing to recover."
        )
    check_apart(config.output, [*input_paths(config), request.artefact], image_folders(config))
    check_output(config.output, force=config.force)
    _check_state(unfinished_folder(config.output), request.artefact)
    check_places(config)
    original, sha256, _, preprocessing = load_model(config)
    compressed = rebuilt(request.artefact, copied(original))
    images = open_images(config.data, config, original, preprocessing)
    test = open_images(config.test, config, original, preprocessing) if config.test else None
    division = divided(images, config.calibration_images, config.seed)
    inputs = Inputs(
        model=original,
        spec=config.model,
        source=config.checkpoint,
        sha256=sha256,
        dtype=getattr(torch, manifest.dtype),
        split=Split(division.learning, division.held_out, {}),
        test=test,
        images=images,
    )
    job = Job.open(inputs, config, track).with_images()
    return _Opened(job, manifest, compressed.float().to(config.device), request)


def _check_state(folder: Path, artefact: str) -> None:
    """Check the folder that a recovery's state is kept in.

    Raises:
        ArtefactError: It is in use: by what is to be recovered, or by the model of a failed run.
    """
    check_output(folder, force=True, kind=UNFINISHED)
    model = folder / MODEL_FILE
    own = result_file(artefact).resolve() == model.resolve()
    if own or (model.exists() and not (folder / RECOVERY_FILE).exists()):
        what = "is what is to be recovered" if own else "is that of a run that failed"
        raise ArtefactError(
            f"The state of this recovery would lie in {folder}, and the model there {what}. Give "
            "another --output, or delete that folder if you do not need it any more."
        )


class _State:
    """What is kept of a recovery on its way, beside the output, so that nothing stops it for good.

    Args:
        opened: What is recovered, and how; only a recovery of the same goes on from it.
    """

    def __init__(self, opened: _Opened) -> None:
        self._opened = opened
        job, wish = opened.job, opened.request.wish
        self._folder = unfinished_folder(job.config.output)
        self._key = {
            "result": sha256_file(result_file(opened.request.artefact)),
            "data": job.inputs.split.fit.fingerprint,
            "seed": job.config.seed,
            "batch size": job.loader.batch_size,
            **dataclasses.asdict(wish),
        }

    def resumed(self, recovering: Recovering) -> Course:
        """The course that was stopped.

        Raises:
            ArtefactError: There is none, or it belongs to something else.
        """
        return recovering.resumed(read_state(self._folder / RECOVERY_FILE, self._key))

    def keeper(self, course: Course, recovering: Recovering) -> Keep:
        """What keeps a course at every check: its state, and the best network as a result."""
        opened = self._opened

        def keep(state: State, tensors: Mapping[str, Tensor]) -> None:
            model = as_saved(recovering.found(course), opened.job.inputs.dtype)
            with atomic_update(self._folder) as partial:
                save(model, _unverified(opened), partial / MODEL_FILE)
                write_state(partial / RECOVERY_FILE, state, tensors, self._key)

        return keep

    def forget(self) -> None:
        """Remove it, once the result stands."""
        for name in (MODEL_FILE, RECOVERY_FILE):
            (self._folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # something else of an unfinished run lies there too
            self._folder.rmdir()


def _unverified(opened: _Opened) -> Manifest:
    """What a recovered network says of itself before anything has measured it."""
    job = opened.job
    recovered = {"data": job.inputs.split.fit.fingerprint, "seed": job.config.seed}
    return dataclasses.replace(opened.manifest, verified={}, recovered=recovered)


def _measured(opened: _Opened, final: nn.Module, recovery: Recovery, clock: Clock) -> Result:
    """Everything there is to say of a recovered network."""
    job, manifest = opened.job, opened.manifest
    network, config, inputs = job.network, job.config, job.inputs
    runtime = read_runtime(opened.request.artefact)
    held_out, test = inputs.split.validation, inputs.test
    yardstick = job.yardstick
    with clock.stage("latency"), evaluation_mode(final):
        stopwatch = Stopwatch.of(config, clock.total, (runtime.memory_format,))
        cost = costs(network, final, inputs.dtype, stopwatch)
    with clock.stage("verify"), evaluation_mode(final):
        layers = verified_layers(network, manifest, final, tracked(yardstick, held_out))
        on_test = None if test is None else yardstick.compare(network.original, final, test)
        on_held_out = None
        if comparable(network, held_out, own=yardstick.metric is not None):
            lenient = dataclasses.replace(yardstick, labels_fit=False)
            on_held_out = lenient.compare(network.original, final, held_out, "validation")
    warnings = [*inputs.warnings, *network.warnings, *cost.refused]
    if runtime.problem:
        warnings.append(runtime.problem)
    if test is None:
        warnings.append("Unverified: no test set was given (--test).")
    result = Result(
        versions=current_versions(),
        model=config.model,
        config=config.settings(),
        source=config.checkpoint,
        source_sha256=inputs.sha256,
        model_fingerprint=inputs.sha256,
        data_fingerprint=inputs.split.fit.fingerprint,
        test_fingerprint="" if test is None else test.fingerprint,
        dtype=manifest.dtype,
        layers=layers,
        validation=on_held_out,
        test=on_test,
        cost=cost,
        warnings=tuple(warnings),
        folded=tuple(pair.norm for pair in network.folded),
        outputs=network.reading.why,
        recovery=recovery,
        seconds=clock.seconds,
    )
    return judged(result, limits_of(config))


def _save(opened: _Opened, final: nn.Module, result: Result) -> None:
    """Write the result folder, all or nothing; without a model where a limit was broken."""
    job = opened.job
    config, network, form = job.config, job.network, result.cost.memory_format
    plan = _plan(opened.request.artefact)
    put_in_format(final, form)
    manifest = _unverified(opened)
    if result.test is not None:
        manifest = dataclasses.replace(manifest, verified=verified_by(result))
    with atomic_folder(config.output, force=config.force) as folder:
        if all(gate.passed for gate in result.gates):
            save(final, manifest, folder / MODEL_FILE)
            write_runtime(folder, Runtime(form))
            check_reload(final, network, folder / MODEL_FILE)
        if plan is not None:
            write_atomically(folder / PLAN_FILE, plan.to_json())
        write_atomically(folder / "config.toml", config.to_toml())
        pair = Pair(network.original, final, network.reading)
        report = build_report(result)
        write_report(report, folder, pictures_of(result, pair, job.inputs.test))
