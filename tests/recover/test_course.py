"""Steps, checks, steps back, and the best state kept."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from compress.data import Loader, as_images
from compress.data.held import hold
from compress.recover import Course, Distance, Division, Length, State, Task, begin, search
from compress.recover.course import MOST_STEPS_BACK, Jury, learner
from compress.recover.search import USUAL
from compress.running.outputs import Part, Reading

READING = Reading((Part("", "classes"),), "", True)


def network(seed: int, width: int = 6) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 4)
        ).eval()


def task(original: nn.Module, **settings: Any) -> Task:
    images = torch.randn(96, 12, generator=torch.Generator().manual_seed(5))
    loader = Loader(16)
    sets = [hold(as_images(part), loader) for part in (images[:80], images[80:])]
    given = {"distance": Distance(READING), **settings}
    return Task(original, Division(*sets), loader, **given)


def course(model: nn.Module, job: Task, steps: int, rate: float = 0.01) -> Course:
    jury = Jury(job)
    start = jury.distance(model)
    copied, weights = learner(model, job)
    return Course(job, copied, weights, State(rate, "none", steps, steps, start=start, best=start),
                  jury)  # fmt: skip


def test_a_network_learns_from_another() -> None:
    original, model = network(0), network(1)
    before = copy.deepcopy(model.state_dict())
    found = begin(model, task(original), Length(steps=800))
    found.run(Length(steps=800))
    assert found.state.step == 800
    assert found.state.best < 0.2 * found.state.start
    assert Jury(found.task).distance(found.best()) == pytest.approx(found.state.best)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_what_is_kept_stays_bit_for_bit() -> None:
    model = network(1)
    found = course(model, task(network(0), keep=frozenset({"1"})), 40)
    found.run(Length(steps=40))
    best = found.best()
    assert torch.equal(best[1].weight, model[1].weight)
    assert torch.equal(best[1].bias, model[1].bias)
    assert not torch.equal(best[3].weight, model[3].weight)


def test_a_tied_weight_is_kept_by_either_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
            self.last.weight = self.first.weight

    weights = learner(Tied(), task(network(0), keep=frozenset({"last"})))[1]
    assert weights.keys() == {"first.bias"}
    assert learner(Tied(), task(network(0), keep=frozenset({"first.bias"})))[1].keys() == {
        "first.weight", "last.bias",
    }  # fmt: skip


def test_constants_learn_nothing_but_a_frozen_network_does() -> None:
    original, model = network(0), network(1)
    for each in (original, model):
        each[1].bias.requires_grad_(False)
    assert "1.bias" not in learner(model, task(original))[1]
    original[1].bias.requires_grad_(True)  # so that it is what was made of it that is frozen
    assert "1.bias" in learner(model, task(original))[1]
    model.requires_grad_(False)
    assert len(learner(model, task(network(0)))[1]) == 4


def test_held_out_images_that_change_by_themselves_are_asked_about_again() -> None:
    class Random(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            (image,) = super().__getitem__(index)
            return (image + torch.rand(()),)

    images = as_images(Random(torch.randn(20, 12)))
    original = network(0)
    jury = Jury(Task(original, Division(images, images), Loader(8), Distance(READING)))
    assert jury.distance(original) == jury.distance(original) == 0.0


def test_nothing_comes_out_worse_than_it_went_in() -> None:
    found = course(network(1), task(network(0)), 200, rate=30.0)
    found.run(Length(steps=200))
    assert found.state.steps_back > 0
    assert found.state.best <= found.state.start
    assert Jury(found.task).distance(found.best()) <= found.state.start * (1 + 1e-9)


def test_of_the_original_itself_nothing_is_nearer() -> None:
    original = network(0)
    found = begin(copy.deepcopy(original), task(original), Length(steps=30))
    found.run(Length(steps=30))
    assert found.state.start == found.state.best == 0
    for name, weight in found.best().state_dict().items():
        assert torch.equal(weight, original.state_dict()[name])


def test_a_loss_that_is_not_finite_steps_back_and_then_ends() -> None:
    class Broken(Distance):
        def training(self, taught: Any, result: Any, images: int) -> Tensor:
            return super().training(taught, result, images) * math.nan

    model = network(1)
    found = course(model, task(network(0), distance=Broken(READING)), 50)
    found.run(Length(steps=50))
    assert found.state.steps_back == MOST_STEPS_BACK + 1
    assert found.state.step == MOST_STEPS_BACK + 1
    assert found.state.rate == 0.01 / 2 ** (MOST_STEPS_BACK + 1)
    for name, weight in found.best().state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


@pytest.mark.parametrize("mixed", [False, True])
def test_a_course_goes_on_to_the_same_bytes(mixed: bool) -> None:
    job, model = task(network(0)), network(1)
    nn.init.zeros_(model[1].bias)  # which has no size of its own
    kept: list[tuple[State, dict[str, Tensor]]] = []

    def keep(state: State, tensors: Any) -> None:
        kept.append((copy.deepcopy(state), {n: t.clone() for n, t in tensors.items()}))

    whole = course(model, job, 100)
    whole.state.mixed = mixed
    whole.run(Length(steps=100), keep)
    for state, tensors in kept[3], kept[11]:
        copied, weights = learner(model, job)
        again = Course(job, copied, weights, copy.deepcopy(state), Jury(job))
        again.load(tensors)
        again.run(Length(steps=100))
        assert again.state.curve == whole.state.curve
        for name, weight in again.best().state_dict().items():
            assert torch.equal(weight, whole.best().state_dict()[name])


def test_a_course_of_few_images_is_judged_less_often() -> None:
    images = torch.randn(400, 12, generator=torch.Generator().manual_seed(5))
    loader = Loader(8)
    sets = [hold(as_images(part), loader) for part in (images[:80], images[80:])]
    job = Task(network(0), Division(*sets), loader, Distance(READING))
    found = course(network(1), job, 250)
    found.run(Length(steps=250))
    # 320 forwards are worth 107 images to learn from; ten times that are 134 batches of 8.
    assert [step for step, _ in found.state.curve] == [134, 250]


def test_a_course_is_judged_at_its_end() -> None:
    found = course(network(1), task(network(0)), 50)
    found.run(Length(steps=50))
    steps = [step for step, _ in found.state.curve]
    assert steps == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 50]


def test_time_that_runs_out_shortens_the_course(monkeypatch: pytest.MonkeyPatch) -> None:
    found = course(network(1), task(network(0)), 400)
    ticks = iter(range(100_000))
    monkeypatch.setattr("compress.recover.course.time.perf_counter", lambda: float(next(ticks)))
    found.run(Length(seconds=800.0))
    assert 40 < found.state.step < 400
    assert found.state.way > 0.9


def test_time_that_is_left_lengthens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = course(network(1), task(network(0)), 100)
    found.state.total = 60
    monkeypatch.setattr("compress.recover.course.time.perf_counter", lambda: 0.5)
    found.run(Length(seconds=1000.0))
    assert found.state.step == 100  # no batches are left


def test_half_of_the_pictures_held_out_are_moved_where_pictures_are_changed() -> None:
    pictures = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    loader = Loader(8)
    sets = [hold(as_images(part), loader) for part in (pictures[:8], pictures[8:])]
    seen = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    shown: list[Tensor] = []
    seen.register_forward_pre_hook(lambda _, given: shown.append(given[0].clone()))
    job = Task(seen, Division(*sets), loader, distance=Distance(READING))
    jury = Jury(job, "pasted")
    assert jury.distance(seen) == 0
    assert jury.distance(seen) == 0
    # The original once, and the network twice, of batches of 8 and 4.
    first, second = shown[0], shown[2]
    assert torch.equal(first[:4], pictures[8:12])
    assert not torch.isclose(first[4:], pictures[12:16]).all(3).all(2).all(1).any()
    assert torch.equal(second[:2], pictures[16:18])
    assert all(torch.equal(shown[i], first) for i in (1, 4))
    plain = Jury(job)
    shown.clear()
    plain.distance(seen)
    assert torch.equal(shown[0], pictures[8:16])


@pytest.mark.parametrize(("images", "kind"), [(20, "pasted"), (600, "none")])
def test_a_short_course_changes_few_pictures_and_leaves_many(images: int, kind: str) -> None:
    pictures = torch.randn(images + 8, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    loader = Loader(8)
    sets = [hold(as_images(part), loader) for part in (pictures[:images], pictures[images:])]
    original, model = (nn.Sequential(nn.Flatten(), network(i, 6)) for i in (0, 1))
    for each in (original, model):
        each[0] = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    job = Task(original, Division(*sets), loader, distance=Distance(READING))
    found = begin(model, job, Length(steps=120))
    assert found.state.augmentation == kind
    assert found.state.rate == USUAL


@pytest.mark.parametrize(
    ("distances", "rate", "tried"),
    [
        # The largest of those about as near as the nearest.
        ({0.001: 1.0, 0.0003: 1.1, 0.003: 1.01, 0.01: 1.2}, 0.003, [0.001, 0.0003, 0.003, 0.01]),
        ({0.001: 1.0, 0.0003: 1.1, 0.003: 1.05}, 0.001, [0.001, 0.0003, 0.003]),
        ({0.001: 1.0, 0.0003: 1.1, 0.003: 0.9, 0.01: 0.8}, 0.01, [0.001, 0.0003, 0.003, 0.01]),
        ({0.001: 1.01, 0.0003: 1.0, 0.003: 1.03, 0.01: 1.2}, 0.003, [0.001, 0.0003, 0.003, 0.01]),
        ({0.001: 1.03, 0.0003: 1.0, 0.003: 1.06}, 0.001, [0.001, 0.0003, 0.003]),
        # Where smaller steps bring it much nearer, larger ones are not tried.
        ({0.001: 1.05, 0.0003: 1.0}, 0.0003, [0.001, 0.0003]),
        ({0.001: math.nan, 0.0003: 1.0}, 0.0003, [0.001, 0.0003]),
        (dict.fromkeys((0.001, 0.0003, 0.003, 0.01), math.inf), 0.0003,
         [0.001, 0.0003, 0.003, 0.01]),
    ],
)  # fmt: skip
def test_the_largest_steps_that_come_about_as_near_are_taken(
    monkeypatch: pytest.MonkeyPatch, distances: dict[float, float], rate: float, tried: list[float]
) -> None:
    asked = []

    class Rated(nn.Module):
        def __init__(self, found: float) -> None:
            super().__init__()
            self.found = found

    class Judge(Jury):
        def distance(self, model: nn.Module) -> float:
            return model.found if isinstance(model, Rated) else super().distance(model)

    def after(_: Any, rate: float, ways: Any) -> nn.Module:
        assert ways.kind == "none"
        asked.append(rate)
        return Rated(distances[rate])

    monkeypatch.setattr(search, "Jury", Judge)
    monkeypatch.setattr(search._Trials, "after", after)
    found = begin(network(1), task(network(0)), Length(steps=800))
    assert found.state.rate == rate
    # At the rate that is taken, features are tried without as well.
    assert asked == [*tried, rate]


def made_for_bfloat16(monkeypatch: pytest.MonkeyPatch, *, able: bool = True) -> None:
    monkeypatch.setattr(search, "computes_in_bfloat16", lambda _: able)
    monkeypatch.setattr(search, "WORTH_MIXING", 16)


@pytest.mark.parametrize("able", [True, False])
def test_networks_learn_in_mixed_precision_where_the_device_is_made_for_it(
    monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    made_for_bfloat16(monkeypatch, able=able)
    original, model = network(0), network(1)
    kinds: dict[str, set[torch.dtype]] = {"original": set(), "model": set()}

    def noted(name: str) -> Any:
        return lambda _, __, result: kinds[name].add(result.dtype)

    original[1].register_forward_hook(noted("original"))
    model[1].register_forward_hook(noted("model"))
    found = begin(model, task(original, macs=1), Length(steps=800))
    assert found.state.mixed is able
    for seen in kinds.values():
        seen.clear()
    found.run(Length(steps=800))
    # Held-out images are judged in full precision; the original's results for them were kept.
    single = {torch.float32, torch.bfloat16} if able else {torch.float32}
    assert kinds["model"] == single
    assert kinds["original"] <= single
    assert found.state.best < 0.25 * found.state.start
    assert all(w.dtype == torch.float32 for w in found.best().parameters())


def test_small_networks_learn_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "computes_in_bfloat16", lambda _: True)
    found = begin(network(1), task(network(0), macs=1000), Length(steps=20))
    assert not found.state.mixed


def test_a_gradient_that_mixed_precision_turns_is_taken_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made_for_bfloat16(monkeypatch)
    original, model = network(0), network(0)
    with torch.no_grad():
        model[3].bias += 1e-5  # far less than what is rounded off
    found = begin(model, task(original, macs=1), Length(steps=20))
    assert not found.state.mixed


def test_a_forward_that_fails_in_mixed_precision_runs_in_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Particular(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise TypeError("single precision only")
            return x

    made_for_bfloat16(monkeypatch)
    original, model = network(0), network(1)
    model.insert(2, Particular())
    found = begin(model, task(original, macs=1), Length(steps=120))
    assert not found.state.mixed
    found.run(Length(steps=120))
    assert found.state.best < found.state.start


def test_the_faster_precision_is_taken_where_the_time_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made_for_bfloat16(monkeypatch)
    for of_mixed, expected in ((0.5, True), (2.0, False)):
        monkeypatch.setattr(
            search,
            "_pace",
            lambda *given, of_mixed=of_mixed: search._Pace(
                0.0, of_mixed if given[-1].mixed else 1.0, 0.0
            ),
        )
        found = begin(network(1), task(network(0), macs=1), Length(seconds=20.0))
        assert found.state.mixed is expected
        assert 10 <= found.state.total <= (40 if expected else 20)
