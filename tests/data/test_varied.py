"""Pictures that come again, changed."""

from __future__ import annotations

import pytest
import torch

from compress.data import Loader, as_images
from compress.data.held import hold
from compress.data.images import ImageSet
from compress.data.varied import VariedImages
from compress.vision.augment import MIRRORED, MOVED, SHIFTED

COUNT = 5


def pictures() -> ImageSet:
    torch.manual_seed(3)
    return hold(as_images(torch.rand(COUNT, 3, 16, 24)), Loader(2))


def read(images: ImageSet, batch: int, workers: int = 0) -> torch.Tensor:
    return torch.cat([inputs for inputs, _ in Loader(batch, workers).batches(images)])


def test_the_pictures_as_they_are_come_first() -> None:
    plain = pictures()
    found = VariedImages.of(plain, MOVED, 2, 0)
    assert len(found) == 3 * COUNT
    inputs = read(found, 4)
    assert torch.equal(inputs[:COUNT], read(plain, COUNT))
    copies = inputs[COUNT:].split(COUNT)
    assert not any(
        torch.equal(picture, before)
        for copied in copies
        for picture, before in zip(copied, inputs[:COUNT], strict=True)
    )
    assert not torch.equal(*copies)
    assert found.name(COUNT + 2) == plain.name(2)
    assert found.labels == plain.labels * 3
    assert found.target(2 * COUNT + 1) == plain.target(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_batches_hold_the_same(workers: int) -> None:
    found = VariedImages.of(pictures(), MOVED, 2, 0)
    whole = read(found, 3 * COUNT)
    assert torch.equal(torch.stack([found[i][0] for i in range(len(found))]), whole)
    for batch in 1, 2, 4, 7:
        assert torch.equal(read(found, batch, workers), whole)


def test_mirrored_pictures_are_whole_and_shifted_ones_are_cut() -> None:
    plain = pictures()
    before = read(plain, COUNT)
    after = read(VariedImages.of(plain, MIRRORED, 4, 0), COUNT)[COUNT:]
    copies = list(zip(after, before.repeat(4, 1, 1, 1), strict=True))
    mirrored = [torch.equal(copied, picture.flip(2)) for copied, picture in copies]
    same = [torch.equal(copied, picture) for copied, picture in copies]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert any(mirrored)
    assert any(same)
    shifted = read(VariedImages.of(plain, SHIFTED, 1, 0), COUNT)[COUNT:]
    for channel, original in zip(shifted.flatten(2), before.flatten(2), strict=True):
        for values, known in zip(channel.tolist(), original.tolist(), strict=True):
            assert set(values) <= set(known)


def test_what_was_done_to_them_counts() -> None:
    plain = pictures()
    found = [
        VariedImages.of(plain, *how).fingerprint
        for how in ((MOVED, 1, 0), (MOVED, 2, 0), (MOVED, 1, 1), (SHIFTED, 1, 0))
    ]
    assert len({plain.fingerprint, *found}) == 5
    assert VariedImages.of(plain, MOVED, 1, 0).fingerprint == found[0]
