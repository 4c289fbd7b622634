"""The order in which channels go, against trying all of them one at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.linalg.selection import (
    Reader,
    Removal,
    compensated,
    removal,
    removal_of_directions,
)


def moments(rows: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(length, length, dtype=torch.float64, generator=generator)
    x = torch.randn(rows, length, dtype=torch.float64, generator=generator) @ mixed
    return x.T @ x / rows


def reader(channels: int, taps: int, out: int, seed: int) -> Reader:
    generator = torch.Generator().manual_seed(seed + 1)
    root = torch.randn(out, channels * taps, dtype=torch.float64, generator=generator)
    columns = torch.arange(channels * taps).reshape(channels, taps)
    return Reader(root, moments(40 * channels * taps, channels * taps, seed), columns)


several = pytest.mark.parametrize(
    "readers",
    [
        [reader(12, 1, 5, 0)],
        [reader(8, 4, 6, 1)],
        [reader(9, 1, 3, 2), reader(9, 3, 4, 3)],
    ],
    ids=["one tap", "four taps", "two readers"],
)


def loss_without(readers: list[Reader], gone: list[int]) -> float:
    """Least squares over the columns that stay, by the pseudo-inverse: nothing of the product."""
    total = 0.0
    for r in readers:
        stay = [k for k in range(len(r.columns)) if k not in gone]
        columns = r.columns[stay].flatten()
        c = r.covariance
        foretold = torch.zeros_like(r.root)
        foretold[:, columns] = (r.root @ c[:, columns]) @ torch.linalg.pinv(c[columns][:, columns])
        delta = r.root - foretold
        total += float(torch.trace(delta @ c @ delta.T))
    return total


def one_at_a_time(readers: list[Reader]) -> tuple[list[int], list[float]]:
    gone: list[int] = []
    losses = [0.0]
    count = len(readers[0].columns)
    while len(gone) < count - 1:
        left = [k for k in range(count) if k not in gone]
        best = min(left, key=lambda k: loss_without(readers, [*gone, k]))
        gone.append(best)
        losses.append(loss_without(readers, gone))
    return gone, losses


@several
def test_channels_go_in_the_order_of_least_loss(readers: list[Reader]) -> None:
    order, losses = one_at_a_time(readers)
    found = removal(readers)
    torch.testing.assert_close(
        found.losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-5, atol=1e-6 * losses[-1]
    )
    assert found.order[:-1].tolist() == order
    assert sorted(found.order.tolist()) == list(range(len(found.order)))


def test_losses_are_those_of_what_is_gone() -> None:
    # Many orders are as good as each other where there are more channels than outputs.
    readers = [reader(40, 1, 2, 4)]
    found = removal(readers)
    for gone in (1, 15, 25, 38):
        expected = loss_without(readers, found.order[:gone].tolist())
        scale = float(found.losses[-1])
        assert float(found.losses[gone]) == pytest.approx(expected, rel=1e-4, abs=1e-5 * scale)


def test_a_channel_that_another_foretells_costs_nothing() -> None:
    base = moments(500, 6, 5)
    # Channel 6 is a copy of channel 2, and 7 the sum of two others.
    mix = torch.cat([torch.eye(6), torch.eye(6)[2:3], torch.eye(6)[:2].sum(0, keepdim=True)])
    mix = mix.double()
    covariance = mix @ base @ mix.T
    root = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = removal([Reader(root, covariance, torch.arange(8).unsqueeze(1))])
    scale = float(torch.trace(root @ covariance @ root.T))
    assert float(found.losses[2]) < 1e-6 * scale
    assert float(found.losses[3]) > 100 * float(found.losses[2])
    stay = found.stay(6)
    weight = compensated(root, covariance, stay)
    delta = root - weight
    assert float(torch.trace(delta @ covariance @ delta.T)) < 1e-6 * scale
    gone = [k for k in range(8) if k not in stay.tolist()]
    assert bool((weight[:, gone] == 0).all())


def turned(r: Reader, basis: Tensor) -> Reader:
    """What a layer reads in directions of its channels."""
    whole = torch.zeros_like(r.covariance)
    for columns in r.columns.T:
        whole[columns.unsqueeze(1), columns] = basis
    return Reader(r.root @ whole, whole.T @ r.covariance @ whole, r.columns)


@several
def test_directions_lose_what_least_squares_leave(readers: list[Reader]) -> None:
    found = removal_of_directions(readers)
    basis = found.basis
    assert basis is not None
    size = len(basis)
    torch.testing.assert_close(basis.T @ basis, torch.eye(size, dtype=torch.float64))
    assert found.order.tolist() == list(range(size))[::-1]
    again = [turned(r, basis) for r in readers]
    scale = float(found.losses[-1])
    for gone in range(size):
        expected = loss_without(again, found.order[:gone].tolist())
        assert float(found.losses[gone]) == pytest.approx(expected, rel=1e-5, abs=1e-6 * scale)


def test_no_directions_lose_less_for_one_reader() -> None:
    """The singular values that are left are a bound (Eckart & Young, 1936)."""
    r = reader(10, 1, 10, 7)
    values = torch.linalg.svdvals(r.root @ torch.linalg.cholesky(r.covariance)).square()
    bounds = torch.cat([values.new_zeros(1), values.flip(0).cumsum(0)[:-1]])
    torch.testing.assert_close(removal_of_directions([r]).losses, bounds, rtol=1e-5, atol=1e-6)


def test_a_stream_of_a_low_rank_is_cut_to_it_without_loss() -> None:
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(9, 4, dtype=torch.float64, generator=generator)
    covariance = mix @ moments(300, 4, 8) @ mix.T
    roots = torch.randn(2, 5, 9, dtype=torch.float64, generator=generator)
    columns = torch.arange(9).unsqueeze(1)
    found = removal_of_directions([Reader(root, covariance, columns) for root in roots])
    whole = float(sum(torch.trace(root @ covariance @ root.T) for root in roots))
    assert float(found.losses[5]) < 1e-6 * whole
    assert float(found.losses[6]) > 1e-3 * whole
    assert float(removal([Reader(root, covariance, columns) for root in roots]).losses[5]) < (
        1e-5 * whole
    )


def test_dead_channels_go_first() -> None:
    covariance = moments(200, 5, 6)
    covariance[3] = covariance[:, 3] = 0
    root = torch.ones(2, 5, dtype=torch.float64)
    found = removal([Reader(root, covariance, torch.arange(5).unsqueeze(1))])
    assert found.order[0] == 3
    assert float(found.losses[1]) == pytest.approx(0, abs=1e-6)


def test_nothing_is_known_where_nothing_was_seen() -> None:
    found = removal([Reader(torch.ones(2, 3), torch.zeros(3, 3), torch.arange(3).unsqueeze(1))])
    assert len(found.order) == 3
    assert bool(torch.isfinite(found.losses).all())


def test_widths_and_losses() -> None:
    found = Removal(torch.tensor([2, 0, 3, 1]), torch.tensor([0.0, 1.0, 3.0, 7.0]))
    assert found.stay(4).tolist() == [0, 1, 2, 3]
    assert found.stay(2).tolist() == [1, 3]
    assert [found.loss(w) for w in (4, 3, 2, 1)] == [0.0, 1.0, 3.0, 7.0]
