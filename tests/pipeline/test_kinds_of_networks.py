"""Networks that people have, through the whole job: splits, checks of sizes, very long patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stopwatch import stop_the_clock
from torch import Tensor, nn

import compress
from compress import compress_model
from compress.errors import BudgetError
from compress.pipeline.outcome import Compressed


@pytest.fixture(autouse=True)
def _stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_the_clock(monkeypatch)


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __init__(self, *shape: int, classes: int = 4) -> None:
        self.shape, self.classes = shape, classes

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= len(self):
            raise IndexError
        label = index % self.classes
        image = torch.rand(self.shape, generator=torch.Generator().manual_seed(index))
        return image + label, label


def conv(a: int, b: int) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, padding=1)


class Split(nn.Module):
    """Half of the channels go one way, half another: a tuple carries everything on."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.left, self.right, self.down = (
            conv(16, 16), conv(8, 8), conv(8, 8), conv(16, 16)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.up(x).chunk(2, dim=1)
        return self.down(torch.cat([self.left(left), self.right(right)], 1))


def classifier(*body: nn.Module, width: int = 16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    for layer in (layer for part in body for layer in part.modules()):
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))
    return nn.Sequential(*body, *head).eval()


def run(model: nn.Module, *shape: int, **settings: object) -> Compressed:
    images = Images(*shape)
    return compress_model(model, images, test=images, calibration_images=40, **settings)


def test_a_tuple_that_carries_everything_on() -> None:
    model = classifier(conv(3, 16), nn.ReLU(), Split(), nn.ReLU(), Split(), nn.ReLU())
    found = run(model, 3, 8, 8, macs=0.7)
    assert found.result.refit_path == "graph"
    assert found.result.cost.compressed.macs <= 0.7 * found.result.cost.folded.macs


class Fourier(nn.Module):
    """A spectral convolution (Li et al., 2021) and a complex one beside plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(16, 16, 4, 4, dtype=torch.complex64) / 16)
        self.lift, self.mixed = nn.Conv2d(3, 16, 1), conv(16, 16)
        self.complex = nn.Conv2d(16, 16, 1, dtype=torch.complex64)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        waves = torch.einsum("nihw,iohw->nohw", torch.fft.rfft2(x)[..., :4, :4], self.spectrum)
        x = torch.fft.irfft2(self.complex(waves), s=x.shape[-2:]) + self.mixed(x)
        return self.head(x.relu().mean((2, 3)))


def test_complex_weights_are_kept(tmp_path: Path) -> None:
    model = Fourier().eval()
    settings = {"rank": {"mixed": "4"}, "scheme": {"mixed": "output"}, "force_rank": True}
    found = run(model, 3, 8, 8, output=str(tmp_path / "out"), **settings)
    kept = {layer.name: layer.reason for layer in found.result.layers if layer.scheme == "dense"}
    assert "complex" in kept["complex"]
    again = compress.load(tmp_path / "out", model=Fourier())
    assert torch.equal(again.spectrum, model.spectrum)
    with torch.no_grad():
        x = torch.rand(2, 3, 8, 8)
        torch.testing.assert_close(again(x), found.model(x))


class WithAuxiliary(nn.Module):
    """A second head that only a flag switches on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 16), conv(16, 16)
        self.auxiliary, self.wanted = conv(16, 4), False
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        between = self.first(x).relu()
        scores = self.head(self.second(between).relu().mean((2, 3)))
        return (scores, self.auxiliary(between)) if self.wanted else scores


@pytest.mark.parametrize(("schemes", "warned"), [(("narrow",), True), (("output",), False)])
def test_channels_that_another_way_through_the_forward_may_need(
    schemes: tuple[str, ...], warned: bool
) -> None:
    found = run(WithAuxiliary().eval(), 3, 8, 8, macs=0.6, schemes=schemes)
    said = [w for w in found.result.warnings if "such as one to auxiliary" in w]
    assert bool(said) == warned


class Careful(nn.Module):
    """The same as its parts in sequence, for whoever has checked its input."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % 2 or width % 2:
            raise ValueError("odd sides")
        for part in self.parts:
            x = part(x)
        return torch.cat(list(x.chunk(2, 1)), 1)


def test_checks_and_loops_cost_nothing() -> None:
    def body() -> list[nn.Module]:
        return [conv(3, 16), nn.ReLU(), conv(16, 16), nn.ReLU(), conv(16, 16), nn.ReLU()]

    plain = run(classifier(*body()), 3, 8, 8, macs=0.6)
    careful = run(classifier(Careful(*body())), 3, 8, 8, macs=0.6)
    for found in (plain, careful):
        assert found.result.refit_path == "graph"
        assert not any("traced" in warning for warning in found.result.warnings)
    values = [list(found.model.state_dict().values()) for found in (plain, careful)]
    assert [v.shape for v in values[0]] == [v.shape for v in values[1]]
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "settings",
    [{"macs": 0.6}, {"params": 0.6}, {"threshold": 0.05},
     {"rank": {"2": "4"}, "scheme": {"2": "input"}}],
    ids=lambda s: next(iter(s)),
)  # fmt: skip
def test_very_long_patches_take_the_output_scheme(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    """As 1,024 channels into a 3x3, with a shorter length for the test."""
    monkeypatch.setattr("compress.linalg.schemes.record.LONGEST_PATCH", 100)
    model = classifier(conv(3, 16), nn.ReLU(), conv(16, 16), nn.ReLU())
    found = run(model, 3, 8, 8, **settings)
    layer = next(layer for layer in found.result.layers if layer.name == "2")
    assert layer.scheme in ("output", "dense")
    assert layer.scheme == "output" or "rank" not in settings
    assert any("take only the output scheme (2)" in w for w in found.result.warnings)


def test_a_budget_is_a_share_of_the_whole_network() -> None:
    """A convolution that is no layer of any known kind counts, and is named where it must be."""

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(16, 3, 3, 3, 3) / 9)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv3d(x, self.kernel, padding=1)

    class Video(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Stem()
            self.rest = classifier(conv(16, 16), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.stem(x).mean(2))

    torch.manual_seed(0)
    images = Images(3, 4, 8, 8)
    stem, conv2d, linear = 27 * 3 * 16 * 256, 9 * 16 * 16 * 64, 16 * 4
    whole = stem + conv2d + linear
    found = compress_model(Video().eval(), images, calibration_images=40, macs=0.97)
    assert found.result.cost.folded.macs == whole
    assert found.result.cost.compressed.macs <= 0.97 * whole
    share = f"{100 * stem / whole:.0f}%"
    with pytest.raises(BudgetError, match=rf"cannot be rewritten: stem \({share}\)"):
        compress_model(Video().eval(), images, calibration_images=40, macs=0.5)


class Kept(nn.Module):
    """Takes what it predicts from its picture, which is needed to the end: nothing cuts the graph.

    Both the picture without the noise and the noise are its outputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 16), nn.ReLU(), conv(16, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        noise = self.body(x)
        return x - noise, noise


def test_a_picture_that_is_needed_to_the_end() -> None:
    torch.manual_seed(0)
    found = compress_model(Kept().eval(), Images(3, 8, 8), calibration_images=40, macs=0.6)
    assert found.result.refit_path == "graph"
    assert found.result.cost.compressed.macs <= 0.6 * found.result.cost.folded.macs
    assert any(layer.refitted for layer in found.result.layers)


def test_a_layer_of_one_output_reads_fewer_channels_and_fewer_taps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 16), nn.ReLU(), conv(16, 1)).eval()
    images = Images(3, 8, 8)
    found = compress_model(model, images, calibration_images=40, macs=0.4)
    last = next(layer for layer in found.result.layers if layer.name == "4")
    assert last.width is not None
    assert last.width[0] < 16
    model = nn.Sequential(conv(3, 1)).eval()
    (only,) = compress_model(model, images, calibration_images=40, macs=0.6).result.layers
    assert (only.scheme, only.macs) in {("spatial", (9 + 3) * 64), ("input", (3 + 9) * 64)}


def test_what_no_scheme_can_stand_for_is_said_to_be_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 1)).eval()
    for settings in ({"macs": 0.6, "schemes": ("output",)}, {"threshold": 1e-2}):
        found = compress_model(model, Images(3, 8, 8), calibration_images=40, **settings)
        assert "rank 1 already" in found.result.layers[-1].reason
    model = nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 16), nn.Conv2d(16, 4, 1)).eval()
    kept = compress_model(model, Images(3, 8, 8), calibration_images=40, macs=0.6,
                          schemes=("spatial",)).result.layers[-1]  # fmt: skip
    assert (kept.scheme, kept.reason) == ("dense", "none of the schemes in play suits it")


def test_what_holds_the_parameters_is_named() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rnn, self.head = nn.Linear(8, 16), nn.GRU(16, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(torch.relu(self.first(x)))[0][:, -1])

    torch.manual_seed(0)
    with pytest.raises(BudgetError, match=r"cannot be rewritten: rnn \(95%\)"):
        run(Recurrent().eval(), 6, 8, params=0.5)
