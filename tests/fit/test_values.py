"""Where channels, positions and images lie in what the nodes of a graph give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refitting import factors_of, labelled, rewritten, traced_of
from torch import Tensor, nn

from compress.fit import stretches
from compress.fit.cuts import NUMBERS, Segment
from compress.fit.frontier import Frontier
from compress.fit.jointly import Movable, refit_jointly
from compress.fit.stretches import StretchWalk
from compress.fit.values import Value
from compress.fit.walk import RefitImages, RefitSettings
from compress.network.baseline import Network, prepare


class Attention(nn.Module):
    """Self-attention with a single head; images lie along axis 0, or along axis 1."""

    def __init__(self, channels: int, images: int = 0) -> None:
        super().__init__()
        self.images = images
        self.read, self.write = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(0, self.images) for part in self.read(x).chunk(3, -1))
        weights = (q @ k.transpose(1, 2)).softmax(-1)
        return self.write((weights @ v).transpose(0, self.images))


class Tokens(nn.Module):
    """A small vision transformer; with 9 channels, as many as tokens, its maps are square."""

    def __init__(self, channels: int = 12, blocks: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 3, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2 * blocks))
        self.attend = nn.ModuleList(Attention(channels) for _ in range(blocks))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, 24), nn.GELU(), nn.Linear(24, channels))
            for _ in range(blocks)
        )
        self.head = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for i, (attend, mlp) in enumerate(zip(self.attend, self.mlps, strict=True)):
            x = x + attend(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(x)


class Mixing(nn.Module):
    """Depthwise convolutions beside linear layers, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inside = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        inside = self.narrow(torch.relu(self.wide(inside)))
        return x + self.scale * inside.permute(0, 3, 1, 2)


class Audio(nn.Module):
    """One-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 8, 3), nn.Conv1d(8, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Encoder(nn.Module):
    """Torch's own encoder, whose norms lie on its stream; tokens come first."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 3, 3)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(12, 2, 24), 2, enable_nested_tensor=False
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.encoder(self.patches(x).flatten(2).permute(2, 0, 1))
        return found.transpose(0, 1)


class Sound(nn.Module):
    """Rows of pixels as a signal, through convolutions of one dimension and back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(27, 12, 3, padding=1), nn.Conv1d(12, 12, 3, padding=1)
        self.up = nn.ConvTranspose1d(12, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.flatten(1, 2)))
        return self.up(torch.relu(self.second(x)))


class Hourglass(nn.Module):
    """A small U-Net, with a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.inside = nn.Conv2d(3, 8, 3, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(8, 6, 3, 3), nn.Conv2d(9, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inside = torch.relu(self.inside(torch.relu(self.down(x))))
        return self.last(torch.cat([x, torch.relu(self.up(inside))], 1))


class SequenceFirst(nn.Module):
    """Turns images into ``[tokens, images, channels]`` on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 3, 3)
        self.first, self.second = Attention(12, 1), Attention(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).permute(2, 0, 1)
        x = x + self.first(x)
        x = x + self.second(x)
        return x.mean(0)


def prepared(model: nn.Module, *shape: int) -> Network:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return prepare(model.eval(), torch.randn(1, *shape))


def walk_of(network: Network, images: int, shape: tuple[int, ...]) -> StretchWalk:
    walk = StretchWalk(traced_of(network), Frontier(1 << 30, Path()))
    walk.start(RefitImages(labelled(torch.randn(images, *shape)), []))
    return walk


def given(network: Network, images: int, *shape: int) -> dict[str, Value]:
    """By node, or by module where a node calls one."""
    walk = walk_of(network, images, shape)
    names = [str(n.target) if n.op == "call_module" else n.name for n in walk.lockstep.nodes]
    return dict(zip(names, walk.values(), strict=True))


@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("channels", [12, 9])
def test_tokens_have_their_channels_last(images: int, channels: int) -> None:
    """With 9 channels and 9 tokens, shapes alone tell nothing."""
    found = given(prepared(Tokens(channels), 3, 9, 9), images, 3, 9, 9)
    for name in ("add", "add_1", "add_2", "add_3", "norms.1", "mlps.0.2"):
        assert (found[name].axis, found[name].positions) == (2, 9), name
        assert found[name].by_image
    assert (found["patches"].axis, found["patches"].positions) == (1, 9)
    assert (found["head"].axis, found["head"].positions) == (2, 9)


def test_what_is_square_and_transposed_tells_nothing() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(torch.relu(x.transpose(1, 2)))

    found = given(prepared(Turned(), 6, 6), 3, 6, 6)
    assert found["first"].axis == found["relu"].axis == found["second"].axis == 2
    assert found["transpose"].axis == 2  # since the second layer reads it so


def test_a_map_that_convolutions_and_linear_layers_read_alike_is_left() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 1)
            self.across, self.along = nn.Conv2d(6, 6, 1), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return self.across(x) + self.along(x)

    found = given(prepared(Both(), 3, 6, 6), 3, 3, 6, 6)
    assert found["stem"].axis is None
    assert found["relu"].axis is None
    with pytest.raises(ValueError, match="channels"):
        found["relu"].rows(torch.zeros(3, 6, 6, 6))


def test_linear_layers_between_convolutions() -> None:
    found = given(prepared(Mixing(), 3, 7, 7), 2, 3, 7, 7)
    assert (found["add"].axis, found["add"].positions) == (1, 49)
    assert found["add"].rows(torch.arange(16.0).view(2, 8, 1, 1))[1].tolist() == [*range(8, 16)]
    assert (found["narrow"].axis, found["narrow"].positions) == (3, 49)
    assert found["norm"].axis == 3


def test_one_dimension() -> None:
    found = given(prepared(Audio(), 2, 20), 4, 2, 20)
    assert (found["relu"].axis, found["relu"].positions) == (1, 18)
    assert (found["second"].axis, found["second"].positions) == (1, 16)


def test_convolutions_alone_tell_where_channels_are() -> None:
    """Behind what takes channels apart and puts them together, nothing else does."""

    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat(list(self.layer(x).chunk(2, 1)), 1).mean((2, 3))

    found = given(prepared(Careful(), 3, 6, 6), 2, 3, 6, 6)["cat"]
    assert found.axis is None
    assert found.behind_layers(["Conv2d", "ConvTranspose2d"]).axis == 1
    for kinds in (["Linear"], ["Conv2d", "Linear"], ["Conv1d"], ["Conv2d", "Conv3d"]):
        assert found.behind_layers(kinds).axis is None
    last = Value(torch.Size((2, 6, 6, 3)), 3, 36)
    assert last.behind_layers(["Conv2d"]).axis == 3


@pytest.mark.parametrize("images", [3, 9, 18])
def test_images_elsewhere_than_first_are_noticed(images: int) -> None:
    found = given(prepared(SequenceFirst(), 3, 9, 9), images, 3, 9, 9)
    assert not found["add"].by_image  # [9 tokens, images, channels]
    assert (found["add"].axis, found["add"].positions) == (2, 9)
    assert found["softmax"].by_image


def test_frames_in_the_axis_of_images_are_parted_by_image() -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x.flatten(0, 1)))
            return self.second(x.mean((2, 3))).unflatten(0, (-1, 5))

    found = given(prepared(Frames(), 5, 3, 6, 6), 4, 5, 3, 6, 6)
    assert found["relu"].by_image
    assert (found["relu"].axis, found["relu"].positions) == (1, 5 * 16)


def test_numbers_and_batches_that_must_stay_whole() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).view(x.size(0), -1)

    walk = walk_of(prepared(Sized(), 3, 6, 6), 4, (3, 6, 6))
    assert NUMBERS in [value.positions for value in walk.values()]
    assert len(walk.number_nodes) == 1
    assert not any(value.by_image for value in walk.values(whole=True))


def smooth(count: int) -> Tensor:
    drawn = torch.randn(count, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(drawn, size=9, mode="bilinear")


@pytest.mark.parametrize(("build", "ranks"), [
    (Tokens, {"mlps.0.0": 4, "mlps.0.2": 4, "attend.1.read": 5, "mlps.1.0": 4}),
    (SequenceFirst, {"first.read": 5, "first.write": 5, "second.read": 5}),
    (Mixing, {"stem": 3, "wide": 4, "narrow": 4}),
    (Encoder, {
        f"encoder.layers.{i}.{n}": 4
        for i in (0, 1) for n in ("self_attn.in_proj", "linear1", "linear2")
    }),
    (Sound, {"first": 5, "second": 5}),
    (Hourglass, {"inside": 3, "up": 3}),
])  # fmt: skip
def test_networks_of_other_layers_come_nearer(
    build: Callable[[], nn.Module], ranks: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their outputs on images that nothing was fitted to."""
    monkeypatch.setattr(stretches, "EPOCHS", 40)
    images = smooth(160)
    network = prepared(build(), 3, 9, 9)
    start = factors_of(network, images[:96], {n: ("output", rank) for n, rank in ranks.items()})
    pictures = RefitImages(labelled(images[:96], 8), labelled(images[96:128], 8))
    found = refit_jointly(traced_of(network), Movable(start), pictures, RefitSettings(weigh=False))
    assert any(found.factors[name] is not start[name] for name in start)
    with torch.no_grad():
        wanted = network.model(images[128:])
        before, after = (
            float((rewritten(network, factors)(images[128:]) - wanted).square().sum())
            for factors in (start, found.factors)
        )
    assert after < 0.95 * before


def test_batches_stay_whole_where_images_are_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """9 tokens of 3 images might be taken for 3 tokens of each."""
    monkeypatch.setattr(stretches, "STEP_POSITIONS", 9)
    monkeypatch.setattr(stretches, "LEAST_IMAGES", 1)
    monkeypatch.setattr(stretches, "STEP_IMAGES", 3)
    network = prepared(SequenceFirst(), 3, 9, 9)
    images = smooth(24)
    ranks = {"first.read": ("output", 4), "second.read": ("output", 4)}
    start = factors_of(network, images[:18], ranks)
    shapes: set[tuple[int, ...]] = set()
    through = StretchWalk.through

    def watched(walk: StretchWalk, segment: Segment, batch: int, value: Tensor) -> Tensor:
        found = through(walk, segment, batch, value)
        shapes.add(tuple(found.shape))
        return found

    monkeypatch.setattr(StretchWalk, "through", watched)
    pictures = RefitImages(labelled(images[:18], 3), labelled(images[18:], 3))
    refit_jointly(traced_of(network), Movable(start), pictures, RefitSettings(weigh=False))
    assert (9, 2, 12) in shapes  # pieces are powers of two
    assert all(shape[0] == 9 for shape in shapes)
