"""Networks with several inputs, with other inputs than pictures, and with any outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stopwatch import stop_the_clock
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import compress
from compress.data import as_images, batches, open_dataset
from compress.data.targets import UNLABELLED
from compress.errors import DataError, GradientError, ModelError
from compress.inputs.load import arity_of
from compress.pipeline.outcome import Compressed
from compress.pipeline.run import compress_model
from compress.running.forward import run_model
from compress.running.structure import tensors
from compress.vision.preprocessing import Preprocessing


class Joined(nn.Module):
    """A picture and a number, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3)
        self.head = nn.Linear(17, 4)

    def forward(self, picture: Tensor, level: Tensor, *, scale: float = 1.0) -> Tensor:
        x = self.second(self.first(picture).relu()).relu().mean((2, 3)) * scale
        return self.head(torch.cat([x, level[:, None]], 1))


class Heads(nn.Module):
    """Nested outputs, one of them whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.more = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.box, self.score = nn.Linear(16, 4), nn.Linear(16, 3)

    def forward(self, picture: Tensor) -> dict[str, Any]:
        x = self.more(self.body(picture).relu()).relu()
        pooled = x.mean((2, 3))
        scores = self.score(pooled).softmax(1)
        return {"maps": [x], "found": (self.box(pooled), scores), "best": scores.argmax(1)}


class Words(nn.Module):
    """Whole numbers ``[N, T]`` in, one value out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.head = (
            nn.Embedding(20, 12),
            nn.Conv1d(12, 16, 3),
            nn.Linear(16, 1),
        )

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.conv(self.embed(ids).transpose(1, 2)).relu().mean(2))
        return found


class Volumes(nn.Module):
    """``[N, C, D, H, W]`` in, the same out."""

    def __init__(self) -> None:
        super().__init__()
        self.thick, self.flat = nn.Conv3d(2, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.thick(x).relu()
        n, c, d, h, w = x.shape
        x = self.flat(x.transpose(1, 2).reshape(n * d, c, h, w)).relu()
        found: Tensor = self.last(x.reshape(n, d, 8, h, w).permute(0, 1, 3, 4, 2))
        return found


class Items(Dataset[Any]):
    def __init__(self, make: Callable[[int], Any], number: int = 24) -> None:
        self.items = [make(i) for i in range(number)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def picture(index: int, side: int = 9) -> Tensor:
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(index))


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_the_clock(monkeypatch)
    torch.manual_seed(0)


def done(model: nn.Module, data: Any, **settings: Any) -> Compressed:
    given = {"calibration_images": 24, "macs": 0.7, **settings}
    made = compress_model(model.eval(), data, **given)
    assert any(layer.scheme != "dense" for layer in made.result.layers)
    return made


BY_POSITION = Items(lambda i: (picture(i), torch.tensor(i / 24), i % 4))
BY_NAME = Items(lambda i: {"picture": picture(i), "level": np.float32(i / 24), "label": i % 4})


@pytest.mark.parametrize("data", [BY_POSITION, BY_NAME, DataLoader(BY_POSITION, 5)])
def test_two_inputs(data: Any, tmp_path: Path) -> None:
    made = done(Joined(), data, test=data, output=str(tmp_path / "out"))
    assert made.result.test is not None
    assert made.result.test.top1_before is not None
    assert made.result.refit_path == "graph"
    again = compress.load(tmp_path / "out", model=Joined())
    inputs = (torch.stack([picture(1), picture(2)]), torch.tensor([0.1, 0.2]))
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs), made.model(*inputs))


def test_however_inputs_are_given_the_result_is_the_same() -> None:
    model = Joined()
    found = [done(model, data).model.state_dict() for data in (BY_POSITION, BY_NAME)]
    assert all(torch.equal(v, found[1][n]) for n, v in found[0].items())


def test_a_collate_function_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def collate(items: list[Any]) -> Any:
        seen.append(len(items))
        pictures = torch.stack([2 * p for p, _, _ in items])
        return (
            pictures,
            torch.stack([level for _, level, _ in items]),
            {"n": [i for *_, i in items]},
        )

    data = DataLoader(BY_POSITION, 4, collate_fn=collate)
    made = done(Joined(), data, batch_size=6)
    assert 6 in seen
    assert made.result.validation is not None
    assert made.result.validation.outputs[0].relative_mse is not None
    given: list[int] = []

    def loss(result: Tensor, targets: dict[str, list[int]]) -> Tensor:
        given.append(len(targets["n"]))
        assert len(result) == len(targets["n"])
        return result.square().sum()

    monkeypatch.setitem(globals(), "own_loss", loss)
    done(Joined(), data, batch_size=6, loss_fn=f"{__name__}:own_loss")
    assert set(given) == {6}


def test_a_loss_of_whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(result: Tensor, targets: Tensor) -> Tensor:
        return (result[:, 0] - targets).square().sum()

    monkeypatch.setitem(globals(), "own_loss", loss)
    data = Items(lambda i: ((torch.arange(8) + i) % 20, float(i)))
    made = done(Words(), data, loss_fn=f"{__name__}:own_loss")
    assert made.result.refit_path == "graph"


def test_a_search_by_accuracy_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "own_metric", lambda *_: 1.0)
    data = Items(lambda i: ((torch.arange(8) + i) % 20, float(i)))
    with pytest.raises(ModelError, match="whatever --metric-fn measures"):
        compress_model(Words(), data, target_drop=1.0, metric_fn=f"{__name__}:own_metric")


class Ending(nn.Module):
    """Ends as detectors decode boxes, in place or not, or so that no gradients come through."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.more, self.how = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.more(self.body(x).relu()).sigmoid()
        if self.how == "in place":
            y[:, :2] = y[:, :2] * 2 - 0.5
            y[:, 2:].mul_(0.5).add_(y[:, :1])
        if self.how == "new":
            first = y[:, :2] * 2 - 0.5
            return torch.cat([first, y[:, 2:] * 0.5 + first[:, :1]], 1)
        return {"detached": y.detach(), "rounded": (9 * y).round()}.get(self.how, y)


@pytest.mark.parametrize("own", [False, True])
def test_gradients_come_through_values_changed_in_place(
    monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """The plan and the network are those of the same network that makes new values."""
    monkeypatch.setitem(globals(), "own_loss", lambda result, _: result.square().sum())
    given = {"loss_fn": f"{__name__}:own_loss"} if own else {}
    found, wanted = (done(Ending(how), Items(picture), **given) for how in ("in place", "new"))
    assert found.plan.metric == "loss"
    assert found.plan.choices == wanted.plan.choices
    states = found.model.state_dict(), wanted.model.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name])


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("detached", "No gradient comes back"),
        ("rounded", "zero at every layer"),
    ],
)
def test_a_network_that_no_gradients_come_through(
    monkeypatch: pytest.MonkeyPatch, how: str, problem: str
) -> None:
    """Its errors are weighed plainly, with a warning; a loss of one's own would have no effect."""
    made = done(Ending(how), Items(picture))
    (warning,) = (w for w in made.result.warnings if "weighed plainly" in w)
    assert problem in warning
    assert made.plan.metric == "mse"
    plainly = done(Ending(how), Items(picture), metric="mse")
    assert made.plan.choices == plainly.plan.choices
    monkeypatch.setitem(globals(), "own_loss", lambda result, _: result.square().sum())
    with pytest.raises(GradientError, match=problem):
        done(Ending(how), Items(picture), loss_fn=f"{__name__}:own_loss")


class Interrupted(nn.Module):
    """No gradient reaches its first layers from the end, or only through values that change."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 3)
        self.head, self.how = nn.Linear(16, 4), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "detached":
            y = self.b(self.a(x).relu())
            return self.head(self.c((y + (y.sign() - y).detach()).relu()).mean((2, 3)).detach())
        with torch.no_grad():
            y = nn.functional.relu_(self.a(x))
            y.sub_(y.mean())
            y = self.b(input=y).clamp_(0)
        return self.head(input=self.c(input=y).relu().mean((2, 3)))


@pytest.mark.parametrize("how", ["detached", "in place"])
def test_the_joint_refit_leaves_what_no_gradient_reaches(how: str) -> None:
    made = done(Interrupted(how), Items(picture), schemes=("output", "spatial", "narrow"))
    assert made.result.refit_path == "graph"
    assert made.result.cost.compressed.macs <= 0.7 * made.result.cost.folded.macs


def test_all_outputs_are_compared() -> None:
    made = done(Heads(), Items(picture))
    metric = made.result.validation
    assert metric is not None
    assert [o.path for o in metric.outputs] == ["maps[0]", "found[0]", "found[1]"]
    assert metric.top1_before is None
    assert "3 outputs" in made.result.outputs
    assert all(o.relative_mse is not None for o in metric.outputs)


def test_the_figures_of_outputs_are_right() -> None:
    from compress.data import Loader, as_images
    from compress.measure.accuracy import Yardstick

    before, after = Heads().eval(), Heads().eval()
    x = torch.stack([picture(i) for i in range(10)])
    found = Yardstick(Loader(3)).compare(before, after, as_images(x))
    with torch.no_grad():
        first, second = tensors(run_model(before, x)), tensors(run_model(after, x))
    for output in found.outputs:
        a, b = first[output.path].double(), second[output.path].double()
        assert output.shape == tuple(a.shape[1:])
        assert output.mse == pytest.approx(float((a - b).square().mean()), rel=1e-5)
        rows = a.transpose(0, 1).flatten(1)
        variance = float(rows.var(1, correction=0).mean())
        assert output.relative_mse == pytest.approx(output.mse / variance, rel=1e-4)


def test_whole_numbers_reach_the_network_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    data = Items(lambda _: (torch.randint(0, 20, (14,), generator=generator), 0.5))
    made = done(Words(), data, macs=0.8)
    assert "values" in made.result.outputs


def test_volumes() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(24, 2, 4, 8, 8, generator=generator)
    done(Volumes(), data, macs=0.8)


def test_arrays_that_are_no_pictures(tmp_path: Path) -> None:
    pictures = torch.stack([picture(i) for i in range(24)]).numpy()
    levels = np.arange(24, dtype=np.float64) / 24
    np.savez(
        tmp_path / "two.npz",
        **{"inputs.0": pictures, "inputs.1": levels, "labels": np.arange(24) % 4},
    )
    images = open_dataset(f"tensors:{tmp_path / 'two.npz'}", Preprocessing())
    (inputs, targets), *_ = batches(images, 5)
    assert [tuple(t.shape) for t in inputs] == [(5, 3, 9, 9), (5,)]
    assert targets.tolist() == [0, 1, 2, 3, 0]
    done(Joined(), images)
    np.savez(tmp_path / "named.npz", **{"inputs.picture": pictures, "inputs.level": levels[:3]})
    with pytest.raises(DataError, match="differ in number: 24 of picture, 3 of level"):
        open_dataset(f"tensors:{tmp_path / 'named.npz'}", Preprocessing())


class AnySize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        found: Tensor = self.head(x.mean((2, 3)))
        return found


def test_sizes_may_differ_in_batches_of_one() -> None:
    data = Items(lambda i: picture(i, 8 + i % 3))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AnySize()
    made = done(model, data, batch_size=1, macs=0.2)  # so little that a refit clearly helps
    assert made.result.refit_path == "graph"
    assert any(layer.refitted for layer in made.result.layers)
    with pytest.raises(DataError, match="--batch-size 1"):
        done(AnySize(), data, batch_size=4)


def test_items_with_too_few_parts() -> None:
    with pytest.raises(DataError, match="takes 2 inputs"):
        done(Joined(), Items(lambda i: (picture(i),)))
    with pytest.raises(DataError, match="what the forward takes by name"):
        done(Joined(), Items(lambda i: {"label": i}))


class Optional(nn.Module):
    """A picture, and what may be left out."""

    def forward(self, x: Tensor, domain: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return x.flatten(1)[:, :2] * scale if domain is None else domain


class Many(nn.Module):
    """As many inputs as there are."""

    def forward(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, 1)


@pytest.mark.parametrize(
    ("model", "item", "inputs", "target"),
    [
        (Optional(), (torch.zeros(3, 4, 4), torch.ones(2), 5), 2, 5),
        (Optional(), (torch.zeros(3, 4, 4), 5), 1, 5),
        (Optional(), (torch.zeros(3, 4, 4),), 1, None),
        (Optional(), (torch.zeros(3, 4, 4), 5, torch.ones(2), torch.ones(2)), 1, 5),
        (Many(), (torch.zeros(2), torch.zeros(3), torch.zeros(4), 5), 3, 5),
        (Many(), (torch.zeros(2), 5), 1, 5),
        (AnySize(), (torch.zeros(3, 4, 4), 5, 6), 1, 5),
    ],
    ids=["all", "less", "alone", "more", "three", "one", "index"],
)
def test_what_of_an_item_is_an_input(
    model: nn.Module, item: tuple[Any, ...], inputs: int, target: int | None
) -> None:
    images = as_images(Items(lambda _: item), arity_of(model))
    found, _ = images.batch([0, 1])
    assert len(tensors(found)) == inputs
    assert images.source.target(0) == (UNLABELLED if target is None else target)


def test_numbers_in_a_batch_of_the_users_are_no_inputs_either() -> None:
    def collate(items: list[Any]) -> Any:
        return torch.zeros(len(items), 3, 4, 4), torch.arange(len(items)), torch.ones(len(items))

    loader = DataLoader(Items(picture), 4, collate_fn=collate)
    with pytest.raises(DataError, match=r"A batch .* 3 parts, .* give a dict"):
        as_images(loader, arity_of(Optional()))
    assert as_images(loader, arity_of(AnySize())).source.target(1) == 0


def test_items_whose_parts_may_be_inputs_or_targets() -> None:
    for model in (Optional(), Many()):
        with pytest.raises(DataError, match=r"3 parts, .* give a dict"):
            as_images(Items(lambda _: (torch.zeros(3, 4, 4), 5, 6)), arity_of(model))


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        (np.zeros((4, 5, 3), np.uint8), (3, 4, 5)),
        (np.zeros((4, 5), np.uint8), (1, 4, 5)),
        (np.zeros((3, 4, 5), np.uint8), (3, 4, 5)),
        (np.zeros((4, 5, 3), np.float32), (4, 5, 3)),
        (np.zeros((2, 40), np.float32), (2, 40)),
        (np.zeros((2, 40), np.int64), (2, 40)),
    ],
)
def test_arrays_are_inputs_unless_they_are_pictures(
    given: np.ndarray[Any, Any], shape: tuple[int, ...]
) -> None:
    """As a DataLoader collates them, which is how such a network was trained."""
    found, _ = as_images(Items(lambda _: (given, 0))).batch([0, 1])
    assert found.shape == (2, *shape)


def test_a_loader_that_does_not_batch_gives_its_items() -> None:
    items = Items(lambda i: (picture(i).requires_grad_(), i))
    found = as_images(DataLoader(items, batch_size=None))
    inputs, _ = found.batch([0, 3])
    assert torch.equal(inputs, torch.stack([picture(0), picture(3)]))
    assert not inputs.requires_grad
    assert found.source.target(3) == 3


class Changing(nn.Module):
    """Returns something else where its input is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.more = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.more(self.body(x).relu())
        return {"dark": y} if float(x.detach().mean()) < 0.5 else {"bright": y}


def test_outputs_that_change_with_the_input() -> None:
    data = Items(lambda i: picture(i) * 0.1 if i % 2 else 1 - 0.1 * picture(i))
    with pytest.raises(ModelError, match="change with its input"):
        done(Changing(), data, batch_size=1)
