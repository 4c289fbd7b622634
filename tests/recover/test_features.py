"""What two networks compute on the way, and that a network learns faster by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.data import Loader, as_images
from compress.data.held import hold
from compress.recover import Course, Distance, Division, Length, State, Task, begin, search
from compress.recover.course import Jury, learner
from compress.recover.features import PLACES, WEIGHT, Features, shared
from compress.recover.lessons import Lessons, repeats
from compress.running.outputs import Part, Reading

READING = Reading((Part("", "classes"),), "", True)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x).relu())


class Stack(nn.Module):
    """Blocks in a row, and a head."""

    def __init__(self, seed: int, blocks: int = 3, width: int = 6) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
            self.head = nn.Linear(8, 4)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def pictures(count: int = 96) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(5))


def task(original: nn.Module, **settings: Any) -> Task:
    loader = Loader(16)
    sets = [hold(as_images(part), loader) for part in (pictures()[:80], pictures()[80:])]
    return Task(original, Division(*sets), loader, Distance(READING), **settings)


def test_blocks_of_the_same_name_and_shape_are_compared() -> None:
    original, model = Stack(0, blocks=2), Stack(1, blocks=2, width=5)
    found = shared(original, model, pictures(8))
    # Hidden layers of other widths are none, and the whole row gives what its last block does.
    assert list(found.weights) == ["blocks.0", "blocks"]
    with found.seen(original) as right, found.seen(model) as own, torch.no_grad():
        original(pictures(8))
        model(pictures(8))
    assert torch.equal(right["blocks"], original.blocks(pictures(8)))
    apart = [
        found.weights[name] * float((right[name] - own[name]).square().mean()) for name in right
    ]
    assert apart == pytest.approx([WEIGHT / 2] * 2)
    assert float(found.apart(right, own)) == pytest.approx(WEIGHT)
    assert float(found.apart(right, {})) == 0
    assert Features().apart({}, {}) == 0


def test_layers_are_compared_where_there_are_no_blocks() -> None:
    made = [nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).eval() for _ in range(2)]
    assert list(shared(made[0], made[1], pictures(8)).weights) == ["0", "1"]


def test_at_most_so_many_places_are_compared_from_front_to_back() -> None:
    found = shared(Stack(0, blocks=20), Stack(1, blocks=20), pictures(8))
    assert len(found.weights) == PLACES
    assert list(found.weights)[-1] == "blocks"
    numbers = [int(name.split(".")[1]) for name in list(found.weights)[:-1]]
    assert numbers == [4, 9, 14]


def test_what_is_alike_already_is_not_compared() -> None:
    original, model = Stack(0), Stack(0)
    assert not shared(original, model, pictures(8)).weights
    with torch.no_grad():
        model.blocks[1].two.bias += 1
    assert list(shared(original, model, pictures(8)).weights) == ["blocks.1", "blocks"]


def test_what_is_called_twice_is_not_compared() -> None:
    class Twice(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[2](self.blocks[1](self.blocks[0](self.blocks[0](x)))))

    original, model = Twice(0), Twice(1)
    assert list(shared(original, model, pictures(8)).weights) == ["blocks.1", "blocks.2"]


def test_a_step_matches_features_as_well_and_in_the_end_the_outputs_alone() -> None:
    original, model = Stack(0), Stack(1)
    job = task(original)
    found = shared(original, model, pictures(16))
    gradients = []
    for way, weights in ((0.0, {}), (0.0, dict(found.weights)), (1.0, dict(found.weights))):
        copied, learning = learner(model, job)
        state = State(0.0, "none", 10, 10, features=weights, way=way)
        course = Course(job, copied, learning, state, Jury(job))
        inputs, right = next(course.lessons().begin(0))
        assert course.step(inputs, right)
        gradients.append(copied.blocks[0].one.weight.grad.clone())  # type: ignore[union-attr, operator]
    plain, with_features, end = gradients
    torch.testing.assert_close(end, plain)
    # By hand: the outputs' loss, and as many times that as the features are apart.
    copied, _ = learner(model, job)
    with found.seen(original) as theirs, found.seen(copied) as own:
        taught = original(inputs).detach()
        loss = job.distance.training((taught,), copied(inputs), len(inputs))
    apart = sum(w * (own[n] - theirs[n].detach()).square().mean() for n, w in found.weights.items())
    (loss + loss.detach() * apart).backward()
    torch.testing.assert_close(with_features, copied.blocks[0].one.weight.grad)  # type: ignore[union-attr]
    assert not torch.allclose(with_features, plain)


@pytest.mark.parametrize(("nearer", "matched"), [(0.5, True), (0.52, False), (0.7, False)])
def test_features_are_matched_where_a_trial_comes_a_quarter_farther_with_them(
    monkeypatch: pytest.MonkeyPatch, nearer: float, matched: bool
) -> None:
    class Judge(Jury):
        def distance(self, model: nn.Module) -> float:
            return getattr(model, "told", 1.0)

    def after(_: Any, __: float, ways: Any) -> nn.Module:
        model = Stack(2)
        model.told = nearer if ways.features.weights else 0.6  # type: ignore[assignment]
        return model

    monkeypatch.setattr(search, "Jury", Judge)
    monkeypatch.setattr(search._Trials, "after", after)
    found = begin(Stack(1), task(Stack(0)), Length(steps=800))
    assert bool(found.state.features) is matched


def test_a_batch_that_is_no_row_of_images_is_shown_as_a_whole() -> None:
    class Scaled(Stack):
        def forward(self, x: Tensor, scale: Tensor, rows: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x[rows] * scale)

    original, model = Scaled(0), Scaled(1)
    batch = pictures(12), torch.tensor(2.0), torch.arange(11)
    found = shared(original, model, batch)
    assert list(found.weights) == ["blocks.0", "blocks.1", "blocks"]


def test_courses_too_short_for_trials_match_outputs_alone() -> None:
    for steps in (20, 200):
        assert not begin(Stack(1), task(Stack(0)), Length(steps=steps)).state.features


def test_the_original_is_asked_every_time_where_features_count() -> None:
    original, model = Stack(0), Stack(1)
    asked: list[int] = []
    original.register_forward_hook(lambda *_: asked.append(1))
    features = shared(original, model, pictures(8))
    assert (repeats(features), repeats(Features())) == (1, 4)
    images = hold(as_images(pictures(16)), Loader(8))
    for used, times in ((features, 12), (Features(), 4)):
        lessons = Lessons(
            images, Loader(8), original, Distance(READING), "none", 0, 12, features=used
        )
        asked.clear()
        rights = [right for _, right in lessons.begin(0)]
        assert len(asked) == times
        assert all(right.features.keys() == used.weights.keys() for right in rights)
