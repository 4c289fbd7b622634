"""The result folder: model, reports, plan and configuration, all or nothing."""

from __future__ import annotations

from pathlib import Path

from compress.artefact.model import save
from compress.artefact.runtime import Runtime, write_runtime
from compress.config import RunConfig
from compress.data import ImageSet
from compress.files import MODEL_FILE, atomic_folder, write_atomically
from compress.pipeline.outcome import Compressed
from compress.pipeline.pictures import Pair, task_panels
from compress.pipeline.reloading import check_reload
from compress.report import build_report, write_report
from compress.report.page import Pictures
from compress.result import Result


def save_result(compressed: Compressed, config: RunConfig, test: ImageSet | None = None) -> None:
    """Write a result folder: model, reports, plan and configuration, all or nothing.

    Raises:
        ArtefactError: The folder cannot be written, or the model read back differs.
    """
    with atomic_folder(config.output, force=config.force) as folder:
        save_into(folder, compressed, config, test)


def save_into(
    folder: Path, compressed: Compressed, config: RunConfig, test: ImageSet | None = None
) -> None:
    """Write the files of a result into a folder of its own; arguments as `save_result`.

    Raises:
        ArtefactError: They cannot be written, or the model read back differs.
    """
    if not compressed.failed_gates:
        save(compressed.model, compressed.manifest, folder / MODEL_FILE)
        write_runtime(folder, Runtime(compressed.result.cost.memory_format))
        check_reload(compressed.model, compressed.network, folder / MODEL_FILE)
    write_atomically(folder / "plan.json", compressed.plan.to_json())
    write_atomically(folder / "config.toml", config.to_toml())
    report = build_report(compressed.result)
    network = compressed.network
    pair = Pair(network.original, compressed.model, network.reading)
    write_report(report, folder, pictures_of(compressed.result, pair, test))


def pictures_of(result: Result, pair: Pair, images: ImageSet | None) -> Pictures:
    """Return the pictures of the test set that a report shows.

    Raises:
        DataError: An image cannot be read.
        ModelError: A forward fails.
    """
    return Pictures(flip_thumbnails(result, images), task_panels(result, pair, images))


def flip_thumbnails(result: Result, images: ImageSet | None, most: int = 48) -> dict[int, bytes]:
    """Small PNG pictures of the test images whose verdict changed, by index."""
    if images is None or result.test is None:
        return {}
    from compress.vision.pictures import thumbnail

    flips = (*result.test.to_wrong[: most // 2], *result.test.to_right[: most // 2])
    return {flip.index: thumbnail(images.raw(flip.index)) for flip in flips}
