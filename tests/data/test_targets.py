"""Targets of every kind reach a loss or a metric as the dataset gives them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from stopwatch import stop_the_clock
from torch import Tensor, nn

from compress import compress_model
from compress.data import Preprocessing, batches
from compress.data.datasets import DatasetSource
from compress.data.held import hold
from compress.data.images import ImageSet
from compress.data.loading import Loader
from compress.data.targets import joined, part
from compress.errors import DataError, ModelError


class Point(NamedTuple):
    x: Tensor
    y: Tensor


class Items(torch.utils.data.Dataset[Any]):
    def __init__(self, targets: list[Any]) -> None:
        self.given = targets

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> Any:
        return torch.full((1, 4, 4), float(index)), self.given[index]


def images_of(targets: list[Any]) -> ImageSet:
    source = DatasetSource.of(Items(targets), "mine", None)
    return ImageSet(source, Preprocessing(), range(len(source)), ())


MASKS = [torch.full((2, 3), k) for k in range(5)]
KINDS: dict[str, tuple[list[Any], Any]] = {
    "class numbers": ([0, 1, 2, 0, 1], torch.tensor([0, 1, 2, 0, 1])),
    "numpy": ([np.int64(k) for k in range(5)], torch.arange(5)),
    "0-dim tensors": ([torch.tensor(k) for k in range(5)], torch.arange(5)),
    "floats": ([0.9, 0.5, 1.0, 2.0, 3.5], torch.tensor([0.9, 0.5, 1.0, 2.0, 3.5])),
    "float tensors": ([torch.tensor([k, 0.5]) for k in range(5)],
                      torch.tensor([[k, 0.5] for k in range(5)])),
    "one-hot": (list(torch.eye(5)), torch.eye(5)),
    "masks": (MASKS, torch.stack(MASKS)),
    "arrays": ([m.numpy() for m in MASKS], torch.stack(MASKS)),
    "dicts": ([{"mask": m, "age": k / 2} for k, m in enumerate(MASKS)],
              {"mask": torch.stack(MASKS), "age": torch.arange(5, dtype=torch.float64) / 2}),
    "several": ([(m, k) for k, m in enumerate(MASKS)], [torch.stack(MASKS), torch.arange(5)]),
    "named": ([Point(m, m + 1) for m in MASKS],
              Point(torch.stack(MASKS), torch.stack(MASKS) + 1)),
    "texts": (list("abcde"), list("abcde")),
    "none": ([None] * 5, torch.full((5,), -1)),
}  # fmt: skip


def equal(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, Tensor):
        return found.dtype == wanted.dtype and torch.equal(found, wanted)
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(equal(found[k], v) for k, v in wanted.items())
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(equal, found, wanted))
    return bool(found == wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_come_in_batches_as_they_are(kind: str) -> None:
    given, wanted = KINDS[kind]
    images = images_of(given)
    ((_, found),) = batches(images, 8)
    assert equal(found, wanted)
    held = hold(images, Loader(3))
    ((_, found),) = batches(held, 8)
    assert equal(found, wanted)
    parts = [labels for _, labels in batches(held, 2)]
    together = joined(joined(parts[0], parts[1]), parts[2])
    assert equal(together, wanted)
    assert equal(joined(part(wanted, 0, 3), part(wanted, 3, None)), wanted)
    subset = held.subset([4, 0])
    assert equal(subset.target(0), images.target(4))


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("class numbers", (0, 1, 2, 0, 1)),
        ("floats", (-1, -1, 1, 2, -1)),
        ("float tensors", (-1,) * 5),
        ("one-hot", (0, 1, 2, 3, 4)),
        ("masks", (-1,) * 5),
    ],
)
def test_whole_numbers_and_single_marks_are_classes(kind: str, labels: tuple[int, ...]) -> None:
    assert images_of(KINDS[kind][0]).labels == labels


def test_a_target_counts_in_the_fingerprint() -> None:
    changed = [m.clone() for m in MASKS]
    changed[0][1, 2] += 1
    prints = {images_of(t).fingerprint for t in (MASKS, changed, list(range(5)))}
    assert len(prints) == 3


def test_targets_of_several_sizes_are_refused_with_a_way_out() -> None:
    images = images_of([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(DataError, match="--batch-size 1"):
        list(batches(images, 2))
    assert len(list(batches(images, 1))) == 2


class Pairs(Items):
    """A picture with noise, and the picture."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(index)
        clean = torch.rand(1, 8, 8, generator=draw)
        return clean + 0.1 * torch.randn(1, 8, 8, generator=draw), clean


def test_pictures_as_targets_go_through_the_whole_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_the_clock(monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 1, 3, padding=1),
    ).eval()  # fmt: skip
    pairs = Pairs([None] * 40)
    own = {"loss_fn": f"{__file__}:squared", "metric_fn": f"{__file__}:minus_error"}
    found = compress_model(model, pairs, test=pairs, calibration_images=40, macs=0.6, **own)  # type: ignore[arg-type]  # settings of several types
    assert found.result.test is not None
    assert found.result.test.custom is not None
    stacked = [torch.stack(column) for column in zip(*(pairs[i] for i in range(40)), strict=True)]
    with torch.no_grad():
        error = float((model(stacked[0]) - stacked[1]).square().mean())
    assert found.result.test.custom.before == pytest.approx(-error, rel=1e-4)
    assert any(layer.refitted for layer in found.result.layers)


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum()


def minus_error(model: nn.Module, loaded: Any) -> float:
    with torch.no_grad():
        errors = [(model(x) - y).square().flatten() for x, y in loaded]
    return -float(torch.cat(errors).mean())


def test_accuracy_asks_for_class_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_the_clock(monkeypatch)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(32, 3)).eval()
    items = Items([torch.rand(3) for _ in range(12)])
    with pytest.raises((DataError, ModelError), match="targets are no class numbers"):
        compress_model(model, items, test=items, calibration_images=12, macs=0.9)
