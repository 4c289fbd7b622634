"""Images are decoded once, however often a run or a sweep reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from workbench import SPEC, Workbench, made_images

from compress.config import make_config
from compress.data import ImageSet, Loader, open_dataset
from compress.data.held import HeldImages, ReadOnce, hold
from compress.data.sources import FolderSource
from compress.inputs.load import load_network
from compress.pipeline.run import compress_network
from compress.sweep import parse_grid, sweep_network
from compress.vision.preprocessing import Preprocessing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures in a folder for each class, which have to be decoded."""
    images, labels = made_images(30)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = tmp_path / "pictures" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{index}.png")
    return tmp_path / "pictures"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each picture was decoded, by its index in the folder."""
    counts: Counter[int] = Counter()
    image = FolderSource.image

    def counted(self: FolderSource, index: int) -> object:
        counts[index] += 1
        return image(self, index)

    monkeypatch.setattr(FolderSource, "image", counted)
    return counts


def times(decoded: Counter[int]) -> list[int]:
    """How often pictures were decoded, the two that are looked at first left out."""
    return sorted(decoded.values())[:-2]


def test_a_run_with_refit_decodes_each_picture_once(
    bench: Workbench, folder: Path, decoded: Counter[int]
) -> None:
    settings = {
        "checkpoint": bench.checkpoint, "model": SPEC, "data": f"imagefolder:{folder}", "macs": 0.6,
    }  # fmt: skip
    config = make_config(settings)
    inputs = load_network(config)
    made = compress_network(inputs, config)
    assert any(layer.refitted for layer in made.result.layers), "the images were read again"
    assert len(decoded) == 30
    assert set(times(decoded)) == {1}


def test_a_sweep_decodes_each_picture_once_for_all_points(
    bench: Workbench, folder: Path, decoded: Counter[int]
) -> None:
    settings = {
        "checkpoint": bench.checkpoint, "model": SPEC, "data": f"imagefolder:{folder}",
        "test": f"imagefolder:{folder}",
    }  # fmt: skip
    config = make_config({**settings, "calibration_images": 20})
    inputs = load_network(config)
    decoded.clear()
    result = sweep_network(inputs, config, parse_grid("macs", "0.9,0.7,0.6"))
    assert len({point.macs for point in result.points}) == 3
    # Twenty calibrate, the refit learns from nine more (one is kept for a recovery), and all thirty
    # are the test set, which is a set of its own.
    assert sum(decoded.values()) <= 20 + 9 + 30 + 1, "one is looked at first"


def test_a_further_picture_that_cannot_be_read_is_said_and_ends_no_run(
    bench: Workbench, folder: Path
) -> None:
    settings = {"checkpoint": bench.checkpoint, "model": SPEC, "data": f"imagefolder:{folder}"}
    config = make_config({**settings, "macs": 0.5, "calibration_images": 20, "batch_size": 4})
    further = load_network(config).split.further
    assert further is not None
    assert len(further) == 9
    (folder / further.name(5)).write_bytes(b"no picture")
    result = compress_network(load_network(config), config).result
    assert result.split is not None
    assert result.split.further_images == 4
    (said,) = [w for w in result.warnings if "joint refit" in w]
    assert further.name(5) in said
    swept = sweep_network(load_network(config), config, parse_grid("macs", "0.9,0.5"))
    assert said in swept.warnings


def test_batches_are_read_as_far_as_they_are_asked_for_and_only_once(
    folder: Path, decoded: Counter[int]
) -> None:
    images = open_dataset(f"imagefolder:{folder}", Preprocessing(channels=1))
    wanted = [inputs for inputs, _ in Loader(7).batches(images)]
    decoded.clear()
    batches = ReadOnce(Loader(7).batches(images))
    found = [next(iter(batches))[0] for _ in range(3)]
    assert all(torch.equal(one, wanted[0]) for one in found)
    assert sum(decoded.values()) == 7
    for _ in range(2):
        found = [inputs for inputs, _ in batches]
        assert [len(one) for one in found] == [7, 7, 7, 7, 2]
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert sum(decoded.values()) == 30


def test_what_exceeds_the_cap_is_read_again(folder: Path, decoded: Counter[int]) -> None:
    images = open_dataset(f"imagefolder:{folder}", Preprocessing(channels=1))
    wanted = [inputs for inputs, _ in Loader(7).batches(images)]
    taken = wanted[0].numel() * 4 + 7 * 8  # pixels and labels
    batches = ReadOnce(Loader(7).batches(images), cap=2 * taken)
    decoded.clear()
    for _ in range(2):
        found = [inputs for inputs, _ in batches]
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    # The last two pictures would have had room, but what is kept has no gaps.
    assert sum(decoded.values()) == 30 + 16


def test_what_is_held_is_what_would_be_decoded(folder: Path) -> None:
    images = open_dataset(f"imagefolder:{folder}", Preprocessing(channels=1))
    held = hold(images, Loader(7))
    assert isinstance(held, HeldImages)
    part, same = held.subset([5, 2]), images.subset([5, 2])
    for one, other in ((held, images), (part, same)):
        assert torch.equal(stacked(one), stacked(other))
        assert one.labels == other.labels
        assert one.fingerprint == other.fingerprint
        assert torch.equal(one[1][0], other[1][0])
    assert hold(held, Loader(7)) is held
    assert hold(images, Loader(7), cap=100) is images


def stacked(images: ImageSet) -> Tensor:
    positions: Sequence[int] = range(len(images))
    return images.stack(positions)


def test_workers_are_not_started_for_what_is_held(folder: Path) -> None:
    images = open_dataset(f"imagefolder:{folder}", Preprocessing(channels=1))
    loader = Loader(8, workers=2)
    assert loader.batches(images).workers == 2
    assert loader.batches(hold(images, Loader(8))).workers == 0


def test_the_command_line_holds_images_too(
    bench: Workbench, folder: Path, decoded: Counter[int]
) -> None:
    done = bench.run("--macs", "0.7", data=f"imagefolder:{folder}", test=None)
    assert done.exit_code == 0, done.stderr
    assert set(times(decoded)) == {1}
