"""The result folder: model, reports, plan and configuration, all or nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from compress.artefact.model import load, save
from compress.artefact.runtime import Runtime, write_runtime
from compress.config import RunConfig
from compress.data import ImageSet
from compress.errors import ArtefactError
from compress.files import MODEL_FILE, atomic_folder, write_atomically
from compress.network.baking import copied
from compress.pipeline.outcome import Compressed
from compress.pipeline.pictures import Pair, task_panels
from compress.report import build_report, write_report
from compress.report.page import Pictures
from compress.result import Result
from compress.running.forward import evaluation_mode, run_model
from compress.running.structure import like_weights, tensors


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
        check_reload(compressed, folder / MODEL_FILE)
    write_atomically(folder / "plan.json", compressed.plan.to_json())
    write_atomically(folder / "config.toml", config.to_toml())
    report = build_report(compressed.result)
    network = compressed.network
    pair = Pair(network.original, compressed.model, network.reading)
    write_report(report, folder, pictures_of(compressed.result, pair, test))


def check_reload(compressed: Compressed, path: Path) -> None:
    """Load a saved model and compare it with the one in memory, bit by bit.

    Raises:
        ArtefactError: They differ.
    """
    reloaded = load(path, model=copied(compressed.network.original).cpu())
    example = compressed.network.example
    reference = next(compressed.model.parameters())
    images = like_weights(example, reference)
    reloaded = reloaded.to(reference.device)
    # Each in its own block: both draw the same random numbers, and count no calls in buffers.
    with torch.no_grad(), evaluation_mode(compressed.model):
        expected = run_model(compressed.model, images)
    with torch.no_grad(), evaluation_mode(reloaded):
        found = run_model(reloaded, images)
    own, loaded = compressed.model.state_dict(), reloaded.state_dict()
    same = own.keys() == loaded.keys() and all(_same_bits(own[k], loaded[k]) for k in own)
    first, second = tensors(expected), tensors(found)
    same = same and first.keys() == second.keys()
    if not same or not all(_same_bits(first[path], second[path]) for path in first):
        raise ArtefactError(
            "The saved model, read back, does not equal the one in memory; nothing was kept. "
            "This is a defect of compress or of the disk: please report it."
        )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal; NaN, which the original may hold, equals itself."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    first, second = (x.detach().reshape(-1).contiguous().view(torch.uint8) for x in (one, other))
    return torch.equal(first, second)


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
