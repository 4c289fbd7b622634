"""Which images are learned from, and in which batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from compress.data import Loader, as_images, split
from compress.data.held import hold
from compress.errors import DataError
from compress.recover.distance import Distance
from compress.recover.lessons import REPEATS, Lessons, divided, taught
from compress.running.outputs import Part, Reading
from compress.vision.augment import MOVED, NONE, PASTED, are_pictures, augmented


class Original(nn.Module):
    """Gives its input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * self.scale


def asked(found: Lessons) -> int:
    """How often the original is asked in all lessons."""
    times: list[int] = []
    found.original.register_forward_hook(lambda *_: times.append(1))
    numbers(found)
    return len(times)


def numbered(count: int, *shape: int) -> Tensor:
    """Images that each hold their own number."""
    return torch.arange(count).float().view(-1, *([1] * len(shape))).expand(-1, *shape).clone()


def lessons(steps: int, count: int = 21, batch: int = 4, kind: str = NONE) -> Lessons:
    images = hold(as_images(numbered(count, 3)), Loader(batch))
    distance = Distance(Reading((Part("", "values"),), "", False))
    return Lessons(images, Loader(batch), Original(), distance, kind, 0, steps)


def numbers(found: Lessons, start: int = 0) -> list[list[int]]:
    return [inputs[:, 0].int().tolist() for inputs, _ in found.begin(start)]


def test_all_images_come_once_a_turn_and_none_is_left_out_for_good() -> None:
    seen = numbers(lessons(steps=40))
    assert len(seen) == 40
    turns = [list(itertools.chain(*seen[i : i + 5])) for i in range(0, 40, 5)]
    assert all(len(set(turn)) == 20 for turn in turns)
    assert {number for turn in turns for number in turn} == set(range(21))


def test_batches_come_again_in_another_order_and_the_original_is_asked_once() -> None:
    found = lessons(steps=5 * REPEATS * 2)
    seen = numbers(found)
    assert found.sets == 2
    assert len({tuple(batch) for batch in seen}) == 10
    assert seen[:5] != seen[10:15]
    assert asked(lessons(steps=5 * REPEATS * 2)) == 10


def test_what_the_original_said_is_not_kept_where_it_is_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("compress.recover.lessons.KEPT_BYTES", 4 * 3 * 4 + 1)
    assert 10 < asked(lessons(steps=40)) < 40


def test_images_that_change_by_themselves_are_asked_about_again() -> None:
    class Random(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            (image,) = super().__getitem__(index)
            return (image + torch.rand(()),)

    distance = Distance(Reading((Part("", "values"),), "", False))
    images = as_images(Random(numbered(8, 3)))
    found = Lessons(images, Loader(4), Original(), distance, NONE, 0, 2 * REPEATS)
    for inputs, right in found.begin(0):
        assert torch.equal(right.outputs[0], inputs)


def test_only_the_part_of_a_result_that_counts_is_kept_in_memory() -> None:
    class Tokens(Original):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).unsqueeze(1).repeat(1, 50, 1)[:, 0]

    distance = Distance(Reading((Part("", "values"),), "", False))
    (found,) = taught(Tokens(), torch.ones(4, 3), distance)
    assert found.untyped_storage().nbytes() == 4 * 3 * 4


def test_going_on_gives_what_would_have_come() -> None:
    whole = numbers(lessons(steps=40))
    assert numbers(lessons(steps=40), start=17) == whole[17:]


def test_the_validation_images_of_the_run_are_held_out_and_its_others_learned_from() -> None:
    images = as_images(numbered(200, 3))
    run = split(images, 40, seed=3)
    found = divided(images, 40, 3)
    learned = {int(i) for i in found.learning.indices}
    held_out = {int(i) for i in found.held_out.indices}
    assert not learned & held_out
    assert learned | held_out == set(range(200))
    assert set(run.fit.indices) <= learned
    assert set(run.validation.indices) <= held_out
    assert len(held_out) == 40


@pytest.mark.parametrize("count", [2, 3, 5, 1000])
def test_some_are_held_out_of_any_number(count: int) -> None:
    found = divided(as_images(numbered(count, 3)), 1000, 0)
    assert len(found.learning) >= 1
    assert len(found.held_out) >= 1
    assert len(found.learning) + len(found.held_out) == count


def test_one_image_is_too_few() -> None:
    with pytest.raises(DataError, match="at least two"):
        divided(as_images(numbered(1, 3)), 10, 0)


def test_pictures_are_mirrored_and_shifted_with_their_border_reflected() -> None:
    height, width = 8, 16
    picture = torch.arange(float(height * width)).view(1, 1, height, width)
    batch = picture.expand(64, -1, -1, -1)
    changed = augmented(batch, MOVED, seed=1)
    assert torch.equal(changed, augmented(batch, MOVED, seed=1))
    assert not torch.equal(changed, augmented(batch, MOVED, seed=2))

    def mirrored(index: int, size: int) -> int:
        index = -index if index < 0 else index
        return 2 * (size - 1) - index if index >= size else index

    possible = set()
    for flip in (False, True):
        for down in range(-1, 2):
            for right in range(-2, 3):
                rows = [mirrored(r + down, height) for r in range(height)]
                columns = [mirrored(c + right, width) for c in range(width)]
                moved = (picture.flip(3) if flip else picture)[0, 0][rows][:, columns]
                possible.add(tuple(moved.flatten().tolist()))
    found = {tuple(one.flatten().tolist()) for one in changed}
    assert found <= possible
    assert len(found) > 10


def test_every_other_picture_gets_a_piece_of_the_next() -> None:
    batch = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 2, 16, 24).clone()
    changed = augmented(batch, PASTED, seed=3)
    assert torch.equal(batch, torch.arange(5.0).view(5, 1, 1, 1).expand(5, 2, 16, 24))
    for index in (1, 3, 4):  # the last has no next one
        assert bool((changed[index] == index).all())
    sizes = set()
    for index in (0, 2):
        assert set(changed[index].unique().tolist()) == {float(index), float(index + 1)}
        foreign = changed[index] == index + 1
        rows, columns = foreign[0].any(1), foreign[0].any(0)
        assert torch.equal(foreign, (rows[:, None] & columns).expand_as(foreign))  # a rectangle
        assert 2 <= int(rows.sum()) <= 12
        assert 3 <= int(columns.sum()) <= 18
        sizes.add((int(rows.sum()), int(columns.sum())))
    assert torch.equal(changed, augmented(batch, PASTED, seed=3))
    assert len(sizes) == 2


def test_only_pictures_are_changed() -> None:
    assert are_pictures(torch.zeros(2, 3, 32, 32))
    assert not are_pictures(torch.zeros(2, 16, 32, 32))
    assert not are_pictures(torch.zeros(2, 3, 4, 32))
    assert not are_pictures(torch.zeros(2, 3, 32))
    assert not are_pictures((torch.zeros(2, 3, 32, 32),))
    assert not are_pictures(torch.zeros(2, 3, 32, 32, dtype=torch.int64))
