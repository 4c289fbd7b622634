"""A sweep from reading its inputs to its folder: points, the chosen one, reports."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.config import RULES, RunConfig
from compress.errors import ConfigError, DataError, GateError
from compress.files import check_apart, write_atomically
from compress.inputs.load import Inputs, input_paths, load_network
from compress.pipeline.folder import save_result
from compress.pipeline.outcome import Compressed
from compress.pipeline.run import compress_network
from compress.progress import Track, silent
from compress.report import build_sweep_report, write_report
from compress.result import SweepPoint, SweepResult
from compress.sweep.evaluate import brief
from compress.sweep.grid import Grid
from compress.sweep.pick import NEEDS_LABELS, Pick
from compress.sweep.store import CHOSEN, PointStore, check_folder, content_key, open_folder, remove
from compress.sweep.work import OnPoint, SweepWork, ignore


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
    test_points: bool = True,
    track: Track = silent,
    on_point: OnPoint = ignore,
) -> Swept:
    """Sweep as ``compress sweep`` does: read, measure every point, choose, save, report.

    The folder ``config.output`` receives ``report.json``, ``report.md``, ``report.html``,
    ``sweep.csv``, ``config.toml``, the finished points and, with a pick, the result folder
    ``chosen``.

    Args:
        config: Inputs and settings; its own rank rule is not looked at.
        grid: The points.
        pick: What the chosen point must satisfy on validation images; None chooses none.
        resume: Take finished points of the same content from the output folder.
        test_points: Measure every point on the test set, and not the chosen one alone.
        track: Progress.
        on_point: Called with each point as it finishes, and whether it was finished before.

    Raises:
        GateError: No point satisfies the pick, or the chosen one fails a gate; the reports stand.
        CompressError: Anything else that stops it; finished points are kept for ``resume``.
    """
    if not config.output:
        raise ConfigError("No output given; pass --output DIR for the sweep's folder.")
    config = _without_rule(config)
    check_folder(config.output, resume, config.force)
    check_apart(config.output, input_paths(config))
    inputs = load_network(config)
    store = PointStore(Path(config.output), content_key(inputs, config, test_points))
    work = SweepWork(inputs, config, grid, test_points=test_points, store=store, track=track)
    if pick is not None:
        _check_pick(pick, inputs, config)
    folder = open_folder(config.output, resume, config.force)
    try:
        points = work.points(on_point)
    except BaseException:
        with suppress(OSError):
            folder.rmdir()  # goes where no point and no statistics came to be
        raise
    index = None if pick is None else pick.choose(points)
    compressed = None
    if index is None and pick is not None:
        remove(folder / CHOSEN)  # an earlier choice, which this pick does not make
    if index is not None:
        compressed = _save_chosen(work, points[index])
        test = compressed.result.test and brief(compressed.result.test)
        points[index] = dataclasses.replace(points[index], chosen=True, test=test)
    result = work.result(points, pick)
    header = f"# compress sweep {grid}{f' --pick {pick.text!r}' if pick else ''}\n"
    write_atomically(folder / "config.toml", header + config.to_toml())
    write_report(build_sweep_report(result), folder)
    store.forget_calibration()
    _judge(config, points, pick, compressed)
    return Swept(result, compressed)


def sweep_network(
    inputs: Inputs,
    config: RunConfig,
    grid: Grid,
    *,
    test_points: bool = True,
    track: Track = silent,
    on_point: OnPoint = ignore,
) -> SweepResult:
    """Measure every point of a grid and write nothing.

    Args:
        inputs: The trained network and its images.
        config: Settings; its own rank rule is not looked at.
        grid: The points.
        test_points: Measure every point on the test set as well, where there is one.
        track: Progress.
        on_point: Called with each point as it finishes.

    Raises:
        CompressError: Of the kind that says whose fault it is; see `compress.errors`.
    """
    config = _without_rule(config)
    work = SweepWork(inputs, config, grid, test_points=test_points, track=track)
    return work.result(work.points(on_point), None)


def _without_rule(config: RunConfig) -> RunConfig:
    """A grid stands for the rank rule, so that of a configuration file does not count."""
    rules: dict[str, Any] = dict.fromkeys(RULES)
    return config.replace(**rules)


def _check_pick(pick: Pick, inputs: Inputs, config: RunConfig) -> None:
    """Raise where the pick asks for what validation images without labels cannot tell."""
    labelled = min(inputs.split.validation.labels, default=-1) >= 0
    if config.metric_fn or labelled:
        return
    for condition in pick.conditions:
        if condition.quantity in NEEDS_LABELS:
            raise DataError(
                f"--pick {pick.text!r} needs labels, and {inputs.split.validation.source.described}"
                " has none; pick by agreement or kl, or pass labelled images with --data."
            )


def _save_chosen(work: SweepWork, point: SweepPoint) -> Compressed:
    """Compress the chosen point as ``compress run`` does, and save it beside the sweep."""
    assert work.store is not None
    fit = work.inputs.split.fit
    config = work.grid.at(work.config, point.value)
    config = config.replace(output=str(work.store.folder / CHOSEN), force=True)
    statistics = work.config.calibration or str(work.store.calibration_file)
    made = compress_network(work.inputs, config.replace(calibration=statistics), track=work.track)
    # The statistics' file goes away with the sweep: what is kept tells what it was made from.
    settings = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    compressed = dataclasses.replace(
        made,
        result=dataclasses.replace(made.result, config=settings, data_fingerprint=fit.fingerprint),
        manifest=dataclasses.replace(
            made.manifest, calibration={**made.manifest.calibration, "data": fit.fingerprint}
        ),
    )
    save_result(compressed, config, work.inputs.test)
    return compressed


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
