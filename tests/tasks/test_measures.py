"""Every measure of a task against numpy, written out as slowly as its definition reads."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compress.errors import DataError, ModelError
from compress.measure.resampling import paired_bootstrap
from compress.running.outputs import Part, Reading
from compress.tasks import TASKS, Measure, TaskMeasure, read_for
from compress.tasks.labels import average_precision
from compress.tasks.masks import predicted
from compress.tasks.pictures import picture_range
from compress.tasks.record import MeanScorer, Scorer

WHY = "needs torchmetrics (pip install 'compress[metrics]')"


def scorer(task: str, part: Part | None, targets: Any, ignore_index: int = 255) -> Scorer:
    pytest.importorskip("lightning_utilities", reason=WHY)
    reading = Reading(() if part is None else (part,), "", False)
    try:
        return TaskMeasure(TASKS[task], ignore_index).scorer(reading, list(targets))
    except ModelError as error:
        pytest.skip(f"{WHY}: {error}")


def in_batches(found: Scorer, results: Tensor, targets: Tensor, size: int = 3) -> Scorer:
    for start in range(0, len(results), size):
        found.add(results[start : start + size], targets[start : start + size])
    return found


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks(images: int, classes: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, classes, (images, 6, 5), generator=generator)
    found[:, 0, :2] = 255
    return found


def iou(found: np.ndarray, truth: np.ndarray, classes: int, ignored: int = 255) -> list[float]:
    """Intersection over union of every class that occurs, pixel by pixel."""
    shares = []
    for k in range(classes):
        both = either = 0
        for a, b in zip(found.ravel(), truth.ravel(), strict=True):
            if b != ignored:
                both += int(a == k and b == k)
                either += int(a == k or b == k)
        if either:
            shares.append(both / either)
    return shares


class TestSegmentation:
    def test_mean_iou_of_the_whole_set_and_of_each_image(self) -> None:
        scores, truth = drawn(7, 4, 6, 5), masks(7, 3)
        truth[2] = 1  # not every class occurs in every image, and class 3 in none
        found = in_batches(scorer("segmentation", Part("", "classes"), truth), scores, truth)
        classes = scores.argmax(1).numpy()
        whole, pixels = found.values()
        assert whole == pytest.approx(np.mean(iou(classes, truth.numpy(), 4)), abs=1e-6)
        judged = truth.numpy() != 255
        assert pixels == pytest.approx((classes == truth.numpy())[judged].mean())
        each = [np.mean(iou(c, t, 4)) for c, t in zip(classes, truth.numpy(), strict=True)]
        alone = found.each()
        assert alone is not None
        assert alone.tolist() == pytest.approx(each)
        assert [n for n, _ in found.by_class()][3] == 0

    def test_resampled_is_that_of_the_images_drawn(self) -> None:
        scores, truth = drawn(5, 3, 6, 5), masks(5, 3)
        found = in_batches(scorer("segmentation", Part("", "classes"), truth), scores, truth)
        counts = torch.tensor([[2.0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.float64)
        picked = [0, 0, 2, 3, 4]
        expected = [
            np.mean(iou(scores[i].argmax(1).numpy(), truth[i].numpy(), 3))
            for i in (picked, range(5))
        ]
        values = found.resampled(counts)
        assert values is not None
        assert values.tolist() == pytest.approx(expected)

    @pytest.mark.parametrize("ignored", [-1, 0])
    def test_another_value_may_be_ignored(self, ignored: int) -> None:
        scores, truth = drawn(4, 3, 6, 5), masks(4, 3)
        truth[truth == 255] = ignored
        part = Part("", "classes")
        found = in_batches(scorer("segmentation", part, truth, ignored), scores, truth)
        classes = scores.argmax(1).numpy()
        shares = [
            ((classes == k) & (truth.numpy() == k)).sum()
            / (((classes == k) | (truth.numpy() == k)) & (truth.numpy() != ignored)).sum()
            for k in range(3)
            if k != ignored
        ]
        assert found.values()[0] == pytest.approx(np.mean(shares), abs=1e-6)

    def test_one_output_means_yes_or_no(self) -> None:
        scores, truth = drawn(4, 1, 6, 5), masks(4, 2)
        part = Part("", "answers", normalised=True)
        found = in_batches(scorer("segmentation", part, truth), scores.sigmoid(), truth[:, None])
        expected = np.mean(iou((scores[:, 0] > 0).numpy().astype(int), truth.numpy(), 2))
        assert found.values()[0] == pytest.approx(expected, abs=1e-6)

    def test_smaller_scores_are_enlarged(self) -> None:
        scores = torch.zeros(1, 2, 2, 2)
        scores[0, 1, :, 1] = 5.0
        classes = predicted(scores - 1, Part("", "classes"), torch.Size([4, 4]))
        assert classes[0].tolist() == [[0, 0, 1, 1]] * 4 or classes[0, :, -1].tolist() == [1] * 4

    @pytest.mark.parametrize(
        ("targets", "says"),
        [
            (torch.full((2, 6, 5), 9), "--ignore-index 9"),
            (torch.full((2, 6, 5), 0.5), "fractions"),
            (torch.zeros(2, 3, 2), "beside outputs"),
            ([1, 2], "list in their place"),
        ],
    )
    def test_masks_that_do_not_fit(self, targets: Any, says: str) -> None:
        found = scorer("segmentation", Part("", "classes"), [])
        with pytest.raises(DataError, match=says):
            found.add(drawn(2, 3, 6, 5), targets)

    def test_masks_of_bytes_for_one_output(self) -> None:
        truth = torch.tensor([0, 255]).repeat(2, 6, 3)
        found = scorer("segmentation", Part("", "answers"), truth)
        found.add(drawn(2, 1, 6, 6), truth)
        with pytest.raises(DataError, match="given as 0 and 1"):
            found.values()


def naive_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """The sum over thresholds of the gain in recall times the precision there."""
    total, area, recall = labels.sum(), 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= threshold
        now = (labels[taken]).sum() / total
        area += (now - recall) * labels[taken].mean()
        recall = now
    return area


class TestMultilabel:
    def test_mean_average_precision_with_ties(self) -> None:
        scores = (drawn(20, 5) * 2).round() / 2
        labels = (drawn(20, 5, seed=3) > 0.4).long()
        labels[:, 4] = 0  # a label that no image has is left out
        found = in_batches(scorer("multilabel", Part("", "answers"), labels), scores, labels, 7)
        expected = [naive_precision(scores[:, k].numpy(), labels[:, k].numpy()) for k in range(4)]
        assert found.values()[0] == pytest.approx(np.mean(expected), abs=1e-6)
        shares = [share for _, share in found.by_class()]
        assert shares[:4] == pytest.approx(expected)
        assert shares[4] is None

    def test_drawn_images_count_as_often_as_they_are_drawn(self) -> None:
        scores, labels = drawn(9).double(), torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 0]) == 1
        picked = [0, 0, 0, 1, 2, 3, 5, 5, 8]
        counts = torch.bincount(torch.tensor(picked), minlength=9).double()[None]
        expected = naive_precision(scores[picked].numpy(), labels[picked].numpy())
        assert float(average_precision(scores, labels, counts)) == pytest.approx(expected)

    def test_ignored_labels_say_nothing(self) -> None:
        scores, labels = drawn(20, 2), (drawn(20, 2, seed=3) > 0.2).long()
        labels[::4, 1] = 255
        found = in_batches(scorer("multilabel", Part("", "answers"), labels), scores, labels)
        known = labels[:, 1].numpy() != 255
        expected = [
            naive_precision(scores[:, 0].numpy(), labels[:, 0].numpy()),
            naive_precision(scores[known, 1].numpy(), labels[known, 1].numpy()),
        ]
        assert found.values()[0] == pytest.approx(np.mean(expected), abs=1e-6)

    @pytest.mark.parametrize("shape", [(20,), (20, 1)])
    def test_a_single_label_as_numbers_or_in_rows(self, shape: tuple[int, ...]) -> None:
        scores, labels = drawn(20, 1), (drawn(20, seed=3) > 0.4).long()
        rows = labels.reshape(shape)
        targets = [int(row) if row.dim() == 0 else row for row in rows]
        assert all(map(TASKS["multilabel"].accepts, targets))
        assert read_for(TASKS["multilabel"], scores, targets).parts[0].kind == "answers"
        found = in_batches(scorer("multilabel", Part("", "answers"), labels), scores, rows, 7)
        expected = naive_precision(scores[:, 0].numpy(), labels.numpy())
        assert found.values()[0] == pytest.approx(expected, abs=1e-6)

    def test_other_numbers_are_refused(self) -> None:
        found = scorer("multilabel", Part("", "answers"), [])
        with pytest.raises(DataError, match="other numbers than 0, 1"):
            found.add(drawn(2, 3), torch.full((2, 3), 2))


def test_regression() -> None:
    output, age = drawn(8, 1), drawn(8, seed=2)
    found = in_batches(scorer("regression", Part("", "values"), age), output, age)
    errors = np.abs(output[:, 0].numpy() - age.numpy())
    assert found.values() == pytest.approx((errors.mean(), np.sqrt((errors**2).mean())), rel=1e-5)
    with pytest.raises(DataError, match="not as many as the outputs"):
        found.add(drawn(2, 3), drawn(2))


def naive_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004 with their Gaussian window at every pixel, the edges mirrored."""
    x = np.arange(11) - 5
    row = np.exp(-(x**2) / (2 * 1.5**2))
    window = np.outer(row, row) / np.outer(row, row).sum()
    found = []
    for p, q in zip(*(np.pad(x, ((0, 0), (5, 5), (5, 5)), mode="reflect") for x in (a, b)),
                    strict=True):  # fmt: skip
        for i in range(p.shape[0] - 10):
            for j in range(p.shape[1] - 10):
                u, v = p[i : i + 11, j : j + 11], q[i : i + 11, j : j + 11]
                mu, nu = (window * u).sum(), (window * v).sum()
                var, war = (window * u * u).sum() - mu**2, (window * v * v).sum() - nu**2
                cov = (window * u * v).sum() - mu * nu
                found.append(
                    (2 * mu * nu + 1e-4) * (2 * cov + 9e-4)
                    / ((mu**2 + nu**2 + 1e-4) * (var + war + 9e-4))
                )  # fmt: skip
    return float(np.mean(found))


class TestRestoration:
    def test_ratio_and_similarity(self) -> None:
        clean = torch.rand(3, 2, 14, 13, generator=torch.Generator().manual_seed(0))
        restored = clean + 0.05 * drawn(3, 2, 14, 13)
        found = in_batches(scorer("restoration", Part("", "values"), clean), restored, clean, 2)
        shown = restored.clamp(0, 1).double().numpy()
        squared = ((shown - clean.double().numpy()) ** 2).mean((1, 2, 3))
        similar = [naive_similarity(a, b) for a, b in zip(shown, clean.numpy(), strict=True)]
        assert found.values()[0] == pytest.approx((-10 * np.log10(squared)).mean(), rel=1e-5)
        assert found.values()[1] == pytest.approx(np.mean(similar), abs=2e-4)

    def test_exact_and_small_pictures(self) -> None:
        clean = (torch.rand(2, 1, 8, 8) * 255).round().byte()
        found = scorer("restoration", Part("", "values"), clean)
        found.add(clean.float() / 255, clean)
        assert found.values() == (100.0, None)

    @pytest.mark.parametrize(
        ("low", "high", "expected"), [(0.1, 0.9, (0, 1)), (-0.9, 0.9, (-1, 1)), (0, 200, (0, 255))]
    )
    def test_range(self, low: float, high: float, expected: Any) -> None:
        assert picture_range([torch.tensor([float(low), float(high)])]) == expected

    def test_unknown_range(self) -> None:
        with pytest.raises(DataError, match="without a known range"):
            picture_range([torch.tensor([-2.1, 2.6])])


def test_detection() -> None:
    """One of two is found, and then one that is none: recall stops at a half."""
    pytest.importorskip("pycocotools", reason=WHY)
    found = scorer("detection", None, [])
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    given = {"boxes": boxes, "labels": torch.tensor([1, 1])}
    seen = torch.tensor([[0.0, 0, 10, 10], [60, 60, 70, 70]])
    result = {"boxes": seen, "scores": torch.tensor([0.9, 0.5]), "labels": torch.tensor([1, 1])}
    found.add([result], {key: value[None] for key, value in given.items()})
    assert found.values() == pytest.approx((51 / 101,) * 3, abs=1e-6)
    with pytest.raises(ModelError, match="as torchvision's"):
        found.add(boxes, [given])
    with pytest.raises(DataError, match="--batch-size 1"):
        found.add([result, result], [given])


class _Means(MeanScorer):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.rows = [values]

    def add(self, result: Any, targets: Any) -> None: ...

    def values(self) -> tuple[float | None, ...]:
        return (float(self.each().mean()),)


@pytest.mark.parametrize("lower", [False, True])
def test_interval_is_that_of_a_mean(lower: bool) -> None:
    before, change = drawn(400), 0.1 + 0.3 * drawn(400, seed=1)
    after = before + change if lower else before - change
    measure = Measure("m", "fraction", lower)
    found = paired_bootstrap(measure, _Means(before), _Means(after), 400)
    assert found is not None
    mean, error = 100 * float(change.mean()), 100 * float(change.std()) / 20
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    assert found == paired_bootstrap(measure, _Means(before), _Means(after), 400)
    assert paired_bootstrap(measure, _Means(before[:9]), _Means(after[:9]), 9) is None


class TestReading:
    def test_the_output_by_its_name(self) -> None:
        result = {"aux": drawn(1, 3, 6, 5), "out": drawn(1, 3, 6, 5)}
        reading = read_for(TASKS["segmentation"], result, [torch.zeros(6, 5).long()])
        assert (reading.parts, reading.ranked) == ((Part("out", "classes"),), False)

    def test_the_only_one_that_fits(self) -> None:
        result = (drawn(1, 7), drawn(1, 3, 6, 5))
        reading = read_for(TASKS["restoration"], result, [torch.zeros(3, 6, 5)])
        assert reading.parts == (Part("[1]", "values"),)

    def test_several_that_fit(self) -> None:
        with pytest.raises(ModelError, match=r"several outputs may be that: \[0\], \[1\]"):
            read_for(TASKS["multilabel"], (drawn(1, 4), drawn(1, 4)), [torch.zeros(4)])

    def test_none_that_fits(self) -> None:
        with pytest.raises(ModelError, match=r"targets have the shape \[6, 5\]"):
            read_for(TASKS["segmentation"], drawn(1, 10), [torch.zeros(6, 5)])

    def test_a_detector_is_judged_whole(self) -> None:
        reading = read_for(TASKS["detection"], [{"boxes": drawn(0, 4)}], [])
        assert (reading.parts, reading.kind) == ((), "values")


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ModelError, match=r"torchmetrics.*pip install 'compress\[metrics\]'"):
        TaskMeasure(TASKS["segmentation"]).scorer(Reading((Part("", "classes"),), "", False), [])
