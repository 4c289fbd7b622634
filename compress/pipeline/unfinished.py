"""What a run whose later stages fail leaves behind: its calibration, its plan, its fitted model.

Minutes of work must not be lost because the test images or the report cannot be had. Nothing is
kept of a run that is interrupted, of one that fails before the calibration is done, and of one
whose limits are broken, which is finished.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from compress.artefact.model import save
from compress.artefact.runtime import Runtime, write_runtime
from compress.calibrate.file import CalibrationKey, write_calibration
from compress.calibrate.statistics import Calibration
from compress.config import RunConfig
from compress.errors import ArtefactError
from compress.files import (
    CALIBRATION_FILE,
    MODEL_FILE,
    RECOVERY_FILE,
    RUNTIME_FILE,
    UNFINISHED,
    atomic_update,
    check_output,
    write_atomically,
)
from compress.network.narrowing import Cut
from compress.pipeline.job import Job
from compress.pipeline.outcome import Clock, manifest_of
from compress.pipeline.reloading import check_reload
from compress.plan import Plan

# Where the plan or the fit fails, statistics that took less time than this are sooner taken again
# than explained.
WORTH_KEEPING = 10.0  # seconds
# Statistics beyond this many bytes are given up for the memory that the refit takes.
LARGEST_HELD = 1 << 30


@dataclass
class Work:
    """What a run has done so far, filled in as it goes.

    Attributes:
        clock: The seconds of each stage.
        job: What it works on.
        calibration: Its statistics, with the `CalibrationKey` that they are written under. None
            before, or where they lie in a file of the user's.
        plan: What it chose.
        cut: The channels that were taken out of the model.
        model: The fitted model, in the dtype it is saved in; None before, and once a limit is
            known to be broken.
        memory_format: What the model lies in.
    """

    clock: Clock = field(default_factory=Clock)
    job: Job | None = None
    calibration: tuple[Calibration, CalibrationKey] | None = None
    plan: Plan | None = None
    cut: Cut | None = None
    model: nn.Module | None = None
    memory_format: str = "contiguous"

    def calibrated(self, job: Job, calibration: Calibration, schemes: tuple[str, ...]) -> None:
        """Note that a job has its statistics."""
        self.job = job
        if not job.config.calibration:
            self.calibration = calibration, job.calibration_key(schemes)

    def before_refit(self) -> None:
        """Give up statistics that take much memory, which the refit may need."""
        if self.calibration is not None and _size(self.calibration[0]) > LARGEST_HELD:
            self.calibration = None

    @property
    def is_worth_keeping(self) -> bool:
        """Whether a failure at this point would lose more than it takes to repeat."""
        if self.model is not None:
            return True
        taken = self.clock.seconds.get("calibrate", 0.0)
        return self.calibration is not None and taken >= WORTH_KEEPING


def _size(calibration: Calibration) -> int:
    """The bytes of all statistics."""
    return sum(
        moments.scatter.numel() * moments.scatter.element_size()
        for one in calibration.statistics.values()
        for moments in one.moments().values()
    )


@contextmanager
def kept_on_failure(config: RunConfig) -> Iterator[Work]:
    """Give a record of the work, and keep what is worth it beside the output if the block fails.

    Where that is goes into a note to the exception. Ctrl-C and its like end a run without a trace.

    Args:
        config: The run's; nothing is kept without an output.
    """
    work = Work()
    try:
        yield work
    except Exception as error:
        if config.output and work.is_worth_keeping:
            error.add_note(_kept(work, config))
        raise


def _kept(work: Work, config: RunConfig) -> str:
    """Keep a run's work, and say where."""
    folder = unfinished_folder(config.output)
    try:
        check_output(folder, force=True, kind=UNFINISHED)
        with atomic_update(folder) as partial:
            kept = _write(work, config, partial)
    except Exception:  # what the run failed for may well keep this from being written too
        return f"What was done until then could not be kept in {folder} either."
    *others, last = kept
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"What was done until then is kept in {folder}: {listed}.{_ways_on(work, config, kept)}"


def unfinished_folder(output: str) -> Path:
    """Where the work of a run that fails is kept: a folder beside its output."""
    path = Path(output)
    return path.with_name(f"{path.name}.unfinished")


_MODEL = "the fitted model, which nothing has verified"
_PLAN = "the plan"
_STATISTICS = "the calibration"


def _write(work: Work, config: RunConfig, folder: Path) -> list[str]:
    """Write what there is, in place of what an earlier run has left; return what it is."""
    kept = []
    for stale in (MODEL_FILE, RUNTIME_FILE, RECOVERY_FILE, "plan.json"):
        (folder / stale).unlink(missing_ok=True)
    # An earlier calibration stays if there is no newer one: this very run may have read it.
    if _save_statistics(work, folder / CALIBRATION_FILE):
        kept.append(_STATISTICS)
        place = unfinished_folder(config.output) / CALIBRATION_FILE
        config = config.replace(calibration=str(place))
    if work.plan is not None:
        write_atomically(folder / "plan.json", work.plan.to_json())
        kept.append(_PLAN)
    if _save_model(work, folder / MODEL_FILE):
        kept.append(_MODEL)
    write_atomically(folder / "config.toml", config.to_toml())
    return kept or ["the configuration"]


def _save_statistics(work: Work, path: Path) -> bool:
    """Save the statistics, and say whether there were any and that went."""
    if work.calibration is None:
        return False
    try:
        write_calibration(path, *work.calibration)
    except ArtefactError:  # they are the largest file: there may be room for all else
        return False
    return True


def _save_model(work: Work, path: Path) -> bool:
    """Save the fitted model, and say whether there is one that now reads back the same."""
    job, plan = work.job, work.plan
    if work.model is None or job is None or plan is None:
        return False
    try:
        save(work.model, manifest_of(job, plan, work.model, work.cut), path)
        write_runtime(path.parent, Runtime(work.memory_format))
        check_reload(work.model, job.network, path)
    except ArtefactError:  # not finite, no room, or not the same: then the plan has to do
        for file in (path, path.with_name(RUNTIME_FILE)):
            file.unlink(missing_ok=True)
        return False
    return True


def _ways_on(work: Work, config: RunConfig, kept: list[str]) -> str:
    """The commands that go on from what was kept."""
    if work.job is None or not work.job.inputs.source:
        return ""  # a program passed the model in
    folder = unfinished_folder(config.output)
    again = f"--config {folder}/config.toml"
    ways = []
    if _MODEL in kept:
        ways.append(f"measure it with `compress verify {folder} {again}`")
    if _PLAN in kept:
        ways.append(f"carry the plan out again with `compress apply {folder}/plan.json {again}`")
    else:
        ways.append(f"choose again with `compress run {again}` and other settings")
    trust = " (with --trust-code where code of your own is named)"
    return f" To go on, {', or '.join(ways)}{trust if _MODEL in kept or _PLAN in kept else ''}."
