"""Streaming moments against all rows at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.linalg.moments import COLUMNS, Moments, gram


def rows_of(groups: int, count: int, features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, features, features, generator=generator, dtype=torch.float64)
    rows = torch.randn(groups, count, features, generator=generator, dtype=torch.float64) @ mix
    return rows + 3 * torch.arange(features)


def oracle(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scatter, one row at a time."""
    groups, count, features = rows.shape
    mean = torch.stack([sum(group) / count for group in rows])
    scatter = torch.zeros(groups, features, features, dtype=rows.dtype)
    for group in range(groups):
        for row in rows[group]:
            scatter[group] += torch.outer(row - mean[group], row - mean[group])
    return mean, scatter


def accumulated(rows: Tensor, cuts: list[int]) -> Moments:
    moments = Moments(rows.shape[0], rows.shape[2])
    for part in torch.tensor_split(rows, cuts, dim=1):
        moments.update(part)
    return moments


def assert_same(found: Moments, wanted: Moments, tolerance: float = 1e-7) -> None:
    assert found.count == wanted.count
    for a, b in ((found.mean, wanted.mean), (found.scatter, wanted.scatter)):
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()) + 1e-300
        )


@given(
    groups=st.integers(1, 3),
    features=st.integers(1, 5),
    count=st.integers(1, 30),
    data=st.data(),
)
@settings(derandomize=True, deadline=None, max_examples=40)
def test_any_split_in_any_order_agrees(
    groups: int, features: int, count: int, data: st.DataObject
) -> None:
    rows = rows_of(groups, count, features)
    mean, scatter = oracle(rows)
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=4)))
    whole = accumulated(rows, [])
    assert whole.count == count
    torch.testing.assert_close(whole.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.scatter, scatter, rtol=1e-10, atol=1e-8)
    assert_same(accumulated(rows, cuts), whole)
    parts = data.draw(st.permutations(torch.tensor_split(rows, cuts, dim=1)))
    shuffled = Moments(groups, features)
    for part in parts:
        shuffled.update(part)
    assert_same(shuffled, whole)


def test_a_few_long_rows_at_a_time_agree_with_all_at_once() -> None:
    rows = rows_of(2, 20, 60)
    mean, scatter = oracle(rows)
    found = accumulated(rows, [1, 3, 10, 15])  # parts of 1 to 7 rows; 60 / FEW_ROWS is 7.5
    assert found.count == 20
    torch.testing.assert_close(found.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.scatter, scatter, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_rows_lose_nothing_to_a_large_mean(dtype: torch.dtype) -> None:
    """The rows are taken as they are; only the product inside a batch is in float32."""
    rows = (rows_of(2, 4000, 3) * 0.1 + 100).to(dtype)
    wanted = accumulated(rows.double(), [])
    assert_same(accumulated(rows, [1000, 1001]), wanted, tolerance=2e-5)
    assert accumulated(rows, []).scatter.dtype == torch.float64


def test_what_rounding_takes_from_a_batch_mean_is_put_back() -> None:
    """A spread of ten steps of float32 around 10,000, whose own mean cannot be represented."""
    rows = (10_000 + 0.01 * rows_of(1, 3000, 2).sub(3 * torch.arange(2))).float()
    assert_same(accumulated(rows, []), accumulated(rows.double(), []), tolerance=1e-6)


def test_covariance_and_second_moment() -> None:
    rows = rows_of(2, 50, 3)
    moments = accumulated(rows, [20])
    wanted = torch.einsum("gni,gnj->gij", rows, rows) / 50
    torch.testing.assert_close(moments.second_moment, wanted, rtol=1e-10, atol=1e-10)
    for group in range(2):
        wanted = torch.cov(rows[group].T, correction=0)
        torch.testing.assert_close(moments.covariance[group], wanted, rtol=1e-10, atol=1e-10)


def test_a_covariance_takes_the_place_of_what_it_is_made_of() -> None:
    rows = rows_of(2, 50, 3)
    moments = accumulated(rows, [20])
    place, wanted = moments.scatter.data_ptr(), moments.covariance
    found = moments.taken_covariance()
    assert torch.equal(found, wanted)
    assert found.data_ptr() == place
    with pytest.raises(RuntimeError):
        moments.update(rows)


def test_nothing_seen_is_zero_and_adds_nothing() -> None:
    empty = Moments(2, 3)
    assert not empty.covariance.any()
    empty.update(torch.zeros(2, 0, 3))
    assert empty.count == 0
    rows = rows_of(2, 5, 3)
    empty.update(rows)
    assert_same(empty, accumulated(rows, []))


def test_state_comes_back_bit_for_bit_and_goes_on() -> None:
    rows = rows_of(2, 30, 3)
    stored = accumulated(rows[:, :10], []).tensors()
    assert all(tensor.is_contiguous() for tensor in stored.values())
    back = Moments.from_tensors(stored)
    assert torch.equal(back.mean, stored["mean"])
    assert torch.equal(back.scatter, stored["scatter"])
    before = stored["scatter"].clone()
    back.update(rows[:, 10:])
    assert_same(back, accumulated(rows, []))
    assert torch.equal(stored["scatter"], before)


def test_rows_that_require_grad_are_detached() -> None:
    moments = Moments(1, 3)
    moments.update(rows_of(1, 5, 3).requires_grad_())
    assert not moments.scatter.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_is_seen(bad: float) -> None:
    rows = rows_of(1, 6, 2)
    assert accumulated(rows, []).is_finite()
    rows[0, 3, 1] = bad
    assert not accumulated(rows, [2]).is_finite()


@pytest.mark.parametrize("features", [COLUMNS, COLUMNS + 1, 3 * COLUMNS + 7])
def test_a_product_of_which_half_is_computed_is_the_whole_product(features: int) -> None:
    rows = rows_of(2, 9, features).float()
    found = gram(rows)
    whole = torch.einsum("gsi,gsj->gij", rows.double(), rows.double())
    torch.testing.assert_close(found.double(), whole, rtol=1e-5, atol=1e-6 * float(whole.max()))
    upper = found.triu(COLUMNS)
    assert torch.equal(upper, found.mT.triu(COLUMNS))
