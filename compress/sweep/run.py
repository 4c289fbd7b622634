"""A sweep from reading its inputs to its folder: points, the chosen one, reports."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from compress.config import RunConfig
from compress.deploy.engines import engine_named
from compress.errors import ConfigError, DataError, GateError
from compress.files import SWEEP, atomic_update, check_apart, check_output, write_atomically
from compress.files.leftovers import remove
from compress.inputs.functions import metric_function
from compress.inputs.load import Inputs, image_folders, input_paths, load_network
from compress.measure.by_task import has_targets
from compress.pipeline.folder import save_into
from compress.pipeline.outcome import Compressed
from compress.pipeline.places import check_places
from compress.pipeline.run import compress_network
from compress.report import build_sweep_report, write_report
from compress.result import SweepPoint, SweepResult
from compress.sweep.deployed import runtime_of
from compress.sweep.evaluate import brief
from compress.sweep.grid import Grid
from compress.sweep.pick import NEEDS_LABELS, Pick
from compress.sweep.store import CHOSEN, PointStore, content_key
from compress.sweep.work import Options, SweepWork
from compress.tasks import TaskMeasure


@dataclass(frozen=True)
class Swept:
    """What a sweep gives back.

    Attributes:
        result: Every point.
        chosen: The point that was picked, compressed and verified; None without a pick.
    """

    result: SweepResult
    chosen: Compressed | None = None


def sweep(
    config: RunConfig,
    grid: Grid,
    *,
    pick: Pick | None = None,
    resume: bool = False,
    options: Options = Options(),
) -> Swept:
    """Sweep as ``compress sweep`` does: read, measure every point, choose, save, report.

    The folder ``config.output`` receives ``report.json``, ``report.md``, ``report.html``,
    ``sweep.csv``, ``config.toml``, the finished points and, with a pick, the result folder
    ``chosen``. What an earlier sweep left there stands until all of it can be replaced.

    Args:
        config: Inputs and settings; its own rank rule is not looked at.
        grid: The points.
        pick: What the chosen point must satisfy on validation images; None chooses none.
        resume: Take finished points of the same content from the output folder.
        options: How the sweep is done.

    Raises:
        GateError: No point satisfies the pick, or the chosen one fails a limit; the reports stand.
        CompressError: Anything else that stops it; finished points are kept for ``resume``.
    """
    if not config.output:
        raise ConfigError("No output given; pass --output DIR for the sweep's folder.")
    config = config.replace(rules={})  # the grid stands for the rank rule
    check_output(config.output, force=resume or config.force, kind=SWEEP)
    check_apart(config.output, input_paths(config), image_folders(config))
    check_places(config)
    if options.int8:
        engine_named(runtime_of(config), config.device)
    inputs = load_network(config)
    deployed_on = runtime_of(config) if options.int8 else ""
    key = content_key(inputs, config, test_points=options.test_points, deployed_on=deployed_on)
    store = PointStore(Path(config.output), key, resume)
    work = SweepWork(inputs, config, grid, options, store)
    if pick is not None:
        _check_pick(pick, inputs, config)
    store.open()
    try:
        points = work.points()
    except BaseException:
        with suppress(OSError):
            store.folder.rmdir()  # goes where no point and no statistics came to be
        raise
    swept = _chosen(work, points, pick)
    _save(work, swept, pick)
    _judge(config, list(swept.result.points), pick, swept.chosen)
    return swept


def _chosen(work: SweepWork, points: list[SweepPoint], pick: Pick | None) -> Swept:
    """Compress the point that the pick chooses, if any."""
    index = None if pick is None else pick.choose(points)
    if index is None:
        return Swept(work.result(points, pick))
    compressed = _compressed(work, points[index])
    test = compressed.result.test and brief(compressed.result.test)
    points[index] = dataclasses.replace(points[index], chosen=True, test=test)
    return Swept(work.result(points, pick), compressed)


def _save(work: SweepWork, swept: Swept, pick: Pick | None) -> None:
    """Put reports and the chosen result into the folder, all in one step."""
    config, store = work.config, work.store
    if store is None:
        raise ValueError("a sweep without a store is not saved")
    with atomic_update(store.folder) as new:
        remove(new / CHOSEN)  # an earlier choice
        if swept.chosen is not None:
            (new / CHOSEN).mkdir()
            save_into(new / CHOSEN, swept.chosen, _chosen_config(work, swept), work.inputs.test)
        header = f"# compress sweep {work.grid}{f' --pick {pick.text!r}' if pick else ''}\n"
        write_atomically(new / "config.toml", header + config.to_toml())
        write_report(build_sweep_report(swept.result), new)
        store.tidy(new, swept.result.points)


def _chosen_config(work: SweepWork, swept: Swept) -> RunConfig:
    """The configuration that makes the chosen result again."""
    value = next(point.value for point in swept.result.points if point.chosen)
    config = work.grid.at(work.config, value)
    return config.replace(output=str(Path(work.config.output) / CHOSEN), force=True)


def sweep_network(
    inputs: Inputs, config: RunConfig, grid: Grid, options: Options = Options()
) -> SweepResult:
    """Measure every point of a grid and write nothing.

    Args:
        inputs: The trained network and its images.
        config: Settings; its own rank rule is not looked at.
        grid: The points.
        options: How the sweep is done.

    Raises:
        CompressError: Of the kind that says whose fault it is; see `compress.errors`.
    """
    work = SweepWork(inputs, config.replace(rules={}), grid, options)
    return work.result(work.points(), None)


def _check_pick(pick: Pick, inputs: Inputs, config: RunConfig) -> None:
    """Raise where the pick asks for what validation images without labels cannot tell."""
    validation, metric = inputs.split.validation, metric_function(config)
    if isinstance(metric, TaskMeasure):
        measured = has_targets(metric.task, validation)
    else:
        measured = metric is not None or min(validation.labels, default=-1) >= 0
    if measured:
        return
    for condition in pick.conditions:
        if condition.quantity in NEEDS_LABELS:
            raise DataError(
                f"--pick {pick.text!r} needs labels, and {validation.source.described}"
                " has none; pick by agreement or kl, or pass labelled images with --data."
            )


def _compressed(work: SweepWork, point: SweepPoint) -> Compressed:
    """Compress the chosen point as ``compress run`` does."""
    config = work.grid.at(work.config, point.value)
    output = str(Path(work.config.output) / CHOSEN)
    config = config.replace(output=output, force=True)
    # The statistics' file goes away with the sweep: what is kept tells what it was made from.
    statistics = work.prepared.config.calibration
    made = compress_network(
        work.job.inputs, config.replace(calibration=statistics), track=work.options.track
    )
    return dataclasses.replace(
        made, result=dataclasses.replace(made.result, config=config.settings())
    )


def _judge(
    config: RunConfig, points: list[SweepPoint], pick: Pick | None, compressed: Compressed | None
) -> None:
    """Raise `GateError` where a pick found nothing, or a gate failed."""
    if pick is not None and compressed is None:
        raise GateError(
            f"No point of the sweep satisfies {pick.text!r} on the validation images. "
            f"{pick.nearest(points)} Nothing was chosen; the report is in {config.output}. Widen "
            "the grid or loosen the condition."
        )
    if compressed is not None and compressed.failed_gates:
        raise GateError(
            f"{'; '.join(compressed.failed_gates)}. The chosen point was not saved; the reports "
            f"are in {config.output}. Loosen the limit, or ask more of --pick."
        )
