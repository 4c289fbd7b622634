"""Networks whose layers are switched between real ones and replacements while they run."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import narrowable
import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import UsageError
from compress.network.mirror import Mirror


class Shared(nn.Module):
    """A layer in two places, and one behind them that writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.last = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = torch.tanh(self.first(x))
        return self.last(scale * self.again(y))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def by_hand(model: Shared, other: Shared, names: tuple[str, ...]) -> Shared:
    """A copy with some layers of another."""
    twin = copy.deepcopy(model)
    if "first" in names:
        twin.first = twin.again = copy.deepcopy(other.first)
    if "last.1" in names:
        twin.last[1] = copy.deepcopy(other.last[1])
    return twin


def test_each_layer_is_switched_at_run_time_in_all_its_places() -> None:
    model, other = Shared().double(), Shared().double()
    before = copy.deepcopy(model.state_dict())
    mirror = Mirror(model, {"first": other.first, "last.1": other.last[1]})
    x = torch.randn(5, 4, dtype=torch.float64)

    def check(*names: str) -> None:
        assert mirror.replaced == names
        assert torch.equal(mirror(x, scale=2.0), by_hand(model, other, names)(x, scale=2.0))

    check()
    mirror.replace("last.1")
    check("last.1")
    mirror.replace("f*")
    check("first", "last.1")
    mirror.restore("last.*")
    check("first")
    mirror.restore()
    check()
    mirror.replace()
    check("first", "last.1")
    mirror.replace_first(1)
    check("first")
    with mirror.replacing("last.1") as same:
        assert same is mirror
        check("last.1")
    check("first")
    with pytest.raises(TypeError), mirror.replacing():
        mirror(no_such_argument=x)
    check("first")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_both_versions_follow_the_mirror() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    mirror = Mirror(model, {"0": nn.Linear(3, 3), "1": nn.Sequential(nn.Dropout(1.0))})
    mirror.replace("1")
    mirror.double().eval()
    x = torch.randn(2, 3, dtype=torch.float64)
    with mirror.replacing():
        assert mirror(x).dtype == torch.float64
        assert mirror(x).any()  # in training dropout of 1 leaves nothing
    mirror.train()
    mirror.restore("1")
    assert all(m.training for m in mirror.modules())
    assert model[0].weight.dtype == torch.float32
    with mirror.replacing("1"):
        assert not mirror(x).any()
    # Gradients reach what is in use, and only that.
    with mirror.replacing("0"):
        mirror(x).sum().backward()
    learned = [name for name, p in mirror.named_parameters() if p.grad is not None]
    assert learned == ["_replacements.0.weight", "_replacements.0.bias"]


def test_a_network_that_is_one_layer() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    mirror = Mirror(model, {"": other})
    x = torch.randn(1, 2)
    assert torch.equal(mirror(x), model(x))
    mirror.replace()
    assert torch.equal(mirror(x), other(x))
    mirror.restore("")
    assert torch.equal(mirror(x), model(x))


def test_what_cannot_be_switched_is_refused() -> None:
    model = Shared()
    mirror = Mirror(model, {"first": nn.Linear(4, 4)})
    with pytest.raises(UsageError, match=r"no layer 'frist' to switch\. Did you mean 'first'"):
        mirror.replace("frist")
    with pytest.raises(UsageError, match=r"no layer 'last\.1'"), mirror.replacing("last.1"):
        pass
    with pytest.raises(TypeError, match="by name, and 0 is none; replace_first"):
        mirror.replace(0)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="1 layers; it cannot replace 2"):
        mirror.replace_first(2)
    assert mirror.replaced == ()
    with pytest.raises(UsageError, match="has no module 'second'"):
        Mirror(model, {"second": nn.Identity()})
    with pytest.raises(UsageError, match="'first' and 'again' are one layer"):
        Mirror(model, {"first": nn.Identity(), "again": nn.Identity()})
    with pytest.raises(UsageError, match="lie inside each other"):
        Mirror(model, {"last": nn.Identity(), "last.1": nn.Identity()})
    with pytest.raises(TypeError, match="first is a Tensor"):
        Mirror(model, {"first": torch.zeros(1)})  # type: ignore[dict-item]  # wrong on purpose


@pytest.mark.parametrize("name", ["mobile", "joined", "tokens", "chain", "upscaled"])
def test_a_compressed_network_beside_the_original(name: str) -> None:
    build, shape = narrowable.NETWORKS[name]
    model = build().eval()
    images = narrowable.smooth(40, shape)
    made = compress.compress_model(
        model, images, params=0.6, no_latency=True, metric="mse", seed=1, calibration_images=40
    )
    mirror = made.mirror()
    changed = [layer.name for layer in made.result.layers if layer.rewritten or layer.refitted]
    assert sorted(mirror.names) == sorted(changed)
    assert mirror.names
    with torch.no_grad():
        dense, small = made.network.model(images), made.model(images)
        assert torch.equal(mirror(images), dense)
        mirror.replace()
        torch.testing.assert_close(mirror(images), small, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(dense, small, atol=1e-3)
        # A layer that only lost outputs changes nothing by itself; those that read them do.
        changes = []
        for layer in mirror.names:
            with mirror.replacing(layer):
                assert mirror(images).shape == dense.shape
                changes.append(float((mirror(images) - dense).abs().max()))
        assert max(changes) > 1e-3
        mirror.restore()
        assert torch.equal(mirror(images), dense)
