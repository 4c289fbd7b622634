"""Inputs that are in part those of the original network."""

from __future__ import annotations

import pytest
import torch
from refitting import factors_of, labelled, traced_of
from torch import Tensor, nn

from compress.fit import stretches
from compress.fit.blend import blended, can_be_blended
from compress.fit.jointly import Movable, refit_jointly
from compress.fit.walk import RefitImages, RefitSettings
from compress.network.baseline import Network, prepare


def drawn(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(5, 3, 7, 7), (2, 40, 9), (400, 3)])
def test_half_of_the_numbers_are_those_of_the_original(shape: tuple[int, ...]) -> None:
    given, original = torch.zeros(shape), torch.ones(shape)
    found = blended(given, original, drawn())
    assert set(found.unique().tolist()) == {0.0, 1.0}
    spread = 0.5 / found.numel() ** 0.5
    assert abs(float(found.mean()) - 0.5) < 4 * spread
    # Numbers that lie next to each other, or above each other in two images, are not alike.
    flat = found.flatten(1)
    for one, other in ((flat[:, 1:], flat[:, :-1]), (flat[1:], flat[:-1])):
        assert abs(float((one == other).float().mean()) - 0.5) < 4 * 0.5 / one.numel() ** 0.5


def test_what_is_drawn_follows_from_the_seed_and_not_from_batches() -> None:
    given, original = torch.randn(12, 3, 5, 5), torch.randn(12, 3, 5, 5)
    whole = blended(given, original, drawn())
    assert torch.equal(whole, blended(given, original, drawn()))
    assert not torch.equal(whole, blended(given, original, drawn(4)))
    one = drawn()
    pairs = zip(given.split(4), original.split(4), strict=True)
    assert torch.equal(torch.cat([blended(*pair, one) for pair in pairs]), whole)


def test_the_layout_in_memory_stays() -> None:
    given, original = (
        torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last) for _ in range(2)
    )
    found = blended(given, original, drawn())
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, blended(given.contiguous(), original.contiguous(), drawn()))


def test_only_real_numbers_of_one_shape_are_blended() -> None:
    numbers = torch.zeros(2, 3)
    assert can_be_blended(numbers, numbers + 1)
    assert not can_be_blended(numbers, numbers[:1])
    assert not can_be_blended(numbers.long(), numbers.long())
    assert not can_be_blended((numbers,), (numbers,))


class Deep(nn.Module):
    """Five layers, the last one behind a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1) for i in range(4)
        )
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        found: Tensor = self.head(x.mean((2, 3)))
        return found


@pytest.fixture(scope="module")
def network() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return prepare(Deep().eval(), torch.randn(1, 3, 9, 9))


@pytest.fixture(scope="module")
def images() -> Tensor:
    smooth = torch.randn(48, 3, 3, 3, generator=drawn(1))
    return nn.functional.interpolate(smooth, size=9, mode="bilinear")


REPLACED = {f"layers.{i}": ("output", 3) for i in range(4)}
PLAIN = RefitSettings(weigh=False)


def test_what_is_learned_from_is_blended_and_nothing_else(
    network: Network, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def noted(given: Tensor, original: Tensor, generator: torch.Generator) -> Tensor:
        assert given.shape == original.shape
        assert not torch.equal(given, original)
        counts.append(len(given))
        return blended(given, original, generator)

    monkeypatch.setattr(stretches, "blended", noted)
    monkeypatch.setattr("compress.fit.jointly.BLOCKS", 1)
    monkeypatch.setattr(stretches, "EPOCHS", 2)
    given = RefitImages(labelled(images[:32], 16), labelled(images[32:], 16))
    movable = Movable(factors_of(network, images[:32], REPLACED))
    refit_jointly(traced_of(network), movable, given, PLAIN)
    # Of two stretches of two layers, the first one reads the images themselves.
    assert counts == [16] * 2 * 2
