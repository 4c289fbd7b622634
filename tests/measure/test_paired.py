"""Paired statistics against published figures and brute force."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import DataError, ModelError
from compress.measure.paired import compare_logits, is_near_chance, mcnemar, paired_interval

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=40)


@st.composite
def comparisons(draw: Any) -> Any:
    """Two sets of logits with many ties, and labels that need not hold every class."""
    images, classes = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    values = st.integers(-2, 2)

    def logits() -> Any:
        rows = st.lists(values, min_size=classes, max_size=classes)
        return torch.tensor(
            draw(st.lists(rows, min_size=images, max_size=images)), dtype=torch.float32
        )

    labels = draw(st.lists(st.integers(0, classes - 1), min_size=images, max_size=images))
    return logits(), logits(), torch.tensor(labels)


def ranking(row: Any) -> Any:
    """Classes from most to least likely, ties to the lower index, by a plain stable sort."""
    return sorted(range(len(row)), key=lambda c: -row[c])


@EXAMPLES
@given(comparisons())
def test_counts_agree_with_loops_over_the_images(case: Any) -> None:
    before, after, labels = case
    n, classes = before.shape
    first = [ranking(row) for row in before.tolist()]
    second = [ranking(row) for row in after.tolist()]
    truth = labels.tolist()
    lost = [i for i in range(n) if first[i][0] == truth[i] != second[i][0]]
    gained = [i for i in range(n) if second[i][0] == truth[i] != first[i][0]]

    found = compare_logits(before, after, labels)

    assert found.top1_before == pytest.approx(
        sum(f[0] == t for f, t in zip(first, truth, strict=True)) / n
    )
    assert found.top1_after == pytest.approx(
        sum(s[0] == t for s, t in zip(second, truth, strict=True)) / n
    )
    assert found.drop == pytest.approx(100 * (found.top1_before - found.top1_after))
    assert [f.index for f in found.to_wrong] == lost
    assert [f.index for f in found.to_right] == gained
    assert (found.to_wrong_count, found.to_right_count) == (len(lost), len(gained))
    assert found.other_flips == sum(
        f[0] != s[0] and truth[i] not in (f[0], s[0])
        for i, (f, s) in enumerate(zip(first, second, strict=True))
    )
    assert found.agreement == pytest.approx(
        sum(f[0] == s[0] for f, s in zip(first, second, strict=True)) / n
    )
    if classes > 5:
        assert found.top5_before == pytest.approx(
            sum(t in f[:5] for f, t in zip(first, truth, strict=True)) / n
        )
        assert found.top5_after == pytest.approx(
            sum(t in s[:5] for s, t in zip(second, truth, strict=True)) / n
        )
    else:
        assert found.top5_before is None
        assert found.top5_after is None
    assert found.drop_interval.low <= found.drop <= found.drop_interval.high
    for c, row in enumerate(found.per_class):
        own = [i for i in range(n) if truth[i] == c]
        assert row.images == len(own)
        if own:
            assert row.before == pytest.approx(sum(first[i][0] == c for i in own) / len(own))
            assert row.change == pytest.approx(100 * (row.after - row.before))
        else:
            assert (row.before, row.after, row.change) == (None, None, None)


@EXAMPLES
@given(comparisons())
def test_divergence_and_confidence_agree_with_loops(case: Any) -> None:
    before, after, labels = case
    found = compare_logits(before, after, labels)
    total, confidences = 0.0, []
    for b, a in zip(before.tolist(), after.tolist(), strict=True):
        p = [math.exp(v) / sum(map(math.exp, b)) for v in b]
        q = [math.exp(v) / sum(map(math.exp, a)) for v in a]
        total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        confidences.append(max(p))
    assert found.mean_kl == pytest.approx(total / len(before), abs=1e-12)
    assert found.confidence_before == pytest.approx(sum(confidences) / len(before))


@EXAMPLES
@given(comparisons())
def test_calibration_error_agrees_with_loops(case: Any) -> None:
    before, after, labels = case
    found = compare_logits(before, after, labels)
    n = len(labels)
    for logits, ece in ((before, found.ece_before), (after, found.ece_after)):
        probabilities = torch.softmax(logits.double(), dim=1)
        total = 0.0
        for i in range(15):
            own = []
            for row, label in zip(probabilities, labels, strict=True):
                confidence = row.max().item()
                if i / 15 < confidence <= (i + 1) / 15:
                    own.append((confidence, ranking(row.tolist())[0] == label.item()))
            if own:
                gap = sum(c for c, _ in own) / len(own) - sum(r for _, r in own) / len(own)
                total += len(own) / n * abs(gap)
        assert ece == pytest.approx(total, abs=1e-9)


def test_a_large_set_is_the_same_in_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(5000, 7, generator=generator)
    after = before + 0.3 * torch.randn(5000, 7, generator=generator)
    labels = before.argmax(1)
    labels[::9] = 0
    found = compare_logits(before, after, labels, names=[f"image {i}" for i in range(5000)])
    torch.testing.assert_close(
        found.mean_kl,
        torch.nn.functional.kl_div(
            after.double().log_softmax(1),
            before.double().log_softmax(1),
            log_target=True,
            reduction="batchmean",
        ).item(),
    )
    assert found.top1_after == pytest.approx((after.argmax(1) == labels).double().mean().item())
    flip = found.to_wrong[-1]
    assert flip.index > 2048
    assert flip.name == f"image {flip.index}"
    assert flip.confidence_after == pytest.approx(
        after[flip.index].double().softmax(0).max().item()
    )


def test_published_interval_and_test() -> None:
    # Airway hyper-responsiveness before and after stem cell transplantation: 1, 1, 7, 12 of 21
    # (Fagerland, Lydersen and Laake 2014, tables II and V).
    low, high = paired_interval(1, 7, 21)
    assert (round(low, 3), round(high, 3)) == (-0.517, -0.026)
    assert round(mcnemar(1, 7), 4) == 0.0703


@pytest.mark.parametrize(
    ("lost", "gained", "images"), [(1, 7, 21), (3, 0, 40), (12, 12, 100), (60, 25, 500), (0, 0, 30)]
)
def test_interval_is_where_the_score_test_turns(lost: Any, gained: Any, images: Any) -> None:
    """The ends are where the score, its nuisance share fitted by a fine grid, is ±z."""

    def score(delta: Any) -> Any:
        gap = 1e-9
        share = np.linspace(max(0.0, -delta) + gap, (1 - delta) / 2 - gap, 400_001)
        likelihood = (
            (images - lost - gained) * np.log(1 - 2 * share - delta)
            + lost * np.log(share + delta)
            + gained * np.log(share)
        )
        best = share[likelihood.argmax()]
        variance = images * (2 * best + delta - delta * delta)
        return (lost - gained - images * delta) / math.sqrt(variance)

    low, high = paired_interval(lost, gained, images)
    assert score(low) == pytest.approx(1.959964, abs=2e-3)
    assert score(high) == pytest.approx(-1.959964, abs=2e-3)


def test_interval_covers_what_it_claims() -> None:
    """Exact coverage, by enumeration of every table of 20 images, stays near 95%."""
    images = 20
    tables = [(b, c) for b in range(images + 1) for c in range(images + 1 - b)]
    ends = np.array([paired_interval(b, c, images) for b, c in tables])
    log_ways = np.array(
        [
            math.lgamma(images + 1)
            - math.lgamma(b + 1)
            - math.lgamma(c + 1)
            - math.lgamma(images - b - c + 1)
            for b, c in tables
        ]
    )
    b, c = np.array(tables).T
    coverage = []
    for p, q in itertools.product((0.02, 0.1, 0.3), (0.02, 0.1, 0.3)):
        weight = np.exp(
            log_ways + b * math.log(p) + c * math.log(q) + (images - b - c) * math.log(1 - p - q)
        )
        assert weight.sum() == pytest.approx(1)
        coverage.append(weight[(ends[:, 0] <= p - q) & (p - q <= ends[:, 1])].sum())
    assert min(coverage) > 0.92
    assert np.mean(coverage) > 0.945


@EXAMPLES
@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 5000))
def test_interval_is_symmetric_and_holds_the_estimate(lost: Any, gained: Any, kept: Any) -> None:
    images = lost + gained + kept
    low, high = paired_interval(lost, gained, images)
    assert -1 <= low < (lost - gained) / images < high <= 1
    mirrored = paired_interval(gained, lost, images)
    assert mirrored == pytest.approx((-high, -low), abs=1e-12)


def test_interval_without_a_flip_narrows_with_the_images() -> None:
    z = 1.959963984540054
    for images in (1, 10, 5000):
        low, high = paired_interval(0, 0, images)
        assert high == pytest.approx(z * z / (images + z * z))
        assert low == pytest.approx(-high)


def test_interval_refuses_impossible_counts() -> None:
    for counts in ((1, 1, 1), (-1, 0, 5), (0, 0, 0)):
        with pytest.raises(ValueError, match="no table has"):
            paired_interval(*counts)


@EXAMPLES
@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_twice_the_binomial_tail(lost: Any, gained: Any) -> None:
    flips, fewer = lost + gained, min(lost, gained)
    tail = sum(Fraction(math.comb(flips, k), 2**flips) for k in range(fewer + 1))
    assert mcnemar(lost, gained) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)


def test_identical_networks_differ_in_nothing() -> None:
    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(1))
    found = compare_logits(logits, logits.clone(), logits.argmax(1))
    assert found.drop == 0.0
    assert found.mean_kl == 0.0
    assert found.agreement == 1.0
    assert found.mcnemar_p == 1.0
    assert found.to_wrong == found.to_right == ()


def test_a_dead_network_earns_one_class_only() -> None:
    labels = torch.arange(10).repeat(5)
    before = torch.nn.functional.one_hot(labels, 10).float()
    found = compare_logits(before, torch.zeros(50, 10), labels)
    assert found.top1_after == pytest.approx(0.1)
    assert found.top5_after == pytest.approx(0.5)


def test_logits_nearer_than_rounding_in_the_softmax_keep_their_order() -> None:
    logits = torch.tensor([[1e-20, 2e-20, 0.0]])
    found = compare_logits(logits, logits, torch.tensor([1]))
    assert found.top1_before == 1.0


def test_without_labels_only_what_needs_none_is_known() -> None:
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(2))
    found = compare_logits(logits, -logits)
    assert found.agreement == 0.0
    assert found.mean_kl > 0
    assert found.top1_before is found.drop is found.mcnemar_p is found.ece_before is None
    assert found.per_class == ()


def test_half_precision_logits_are_compared_in_double() -> None:
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(3))
    half = logits.to(torch.bfloat16)
    assert compare_logits(half, half.double(), torch.zeros(8, dtype=torch.long)).mean_kl == 0.0


@pytest.mark.parametrize(
    ("accuracy", "classes", "warned"),
    [
        (0.0, 10, True),
        (0.13, 10, True),
        (0.25, 10, False),
        (0.5, 2, True),
        (0.7, 2, False),
        (0.002, 1000, True),
        (1.0, 1, False),
    ],
)
def test_near_chance(accuracy: Any, classes: Any, warned: Any) -> None:
    assert is_near_chance(accuracy, classes) is warned


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_name_the_image_and_the_network(bad: Any) -> None:
    good = torch.zeros(3000, 3)
    broken = good.clone()
    broken[2500, 1] = bad
    with pytest.raises(ModelError, match=r"compressed network returned NaN or infinite.* 2500"):
        compare_logits(good, broken)
    with pytest.raises(ModelError, match="original returned NaN"):
        compare_logits(broken, good)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"after": torch.zeros(4, 2)}, ModelError, r"\[4, 3\].*\[4, 2\]"),
        ({"before": torch.zeros(4), "after": torch.zeros(4)}, ModelError, "--metric-fn"),
        ({"before": torch.zeros(0, 3), "after": torch.zeros(0, 3)}, ModelError, "at least one"),
        ({"labels": torch.tensor([0, 1, 2, 3])}, DataError, "label 3 is outside 0 to 2"),
        ({"labels": torch.tensor([0, 1, 2, -1])}, DataError, "label -1 is outside"),
        ({"labels": torch.tensor([0, 1])}, DataError, r"shape \[2\] for 4"),
        ({"labels": torch.zeros(4)}, DataError, "whole numbers"),
        ({"classes": ["a", "b"]}, DataError, "2 classes .a, b. .*output has 3"),
        ({"names": ["a"]}, DataError, "1 image names for 4"),
    ],
)
def test_what_does_not_fit_is_refused(changes: Any, error: Any, message: Any) -> None:
    arguments = {"before": torch.zeros(4, 3), "after": torch.zeros(4, 3)} | changes
    with pytest.raises(error, match=message):
        compare_logits(**arguments)
