"""Which pictures are varied for calibration, and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from compress.commands.group import cli
from compress.data import Loader, as_images
from compress.data.held import hold
from compress.data.varied import VariedImages
from compress.network.baseline import prepare
from compress.pipeline.variation import ENOUGH, varied

DEMO = Path(__file__).resolve().parents[2] / "compress/demo_data"


class Sided(nn.Module):
    """Two classes: by what lies on the left and on the right."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images).relu()
        middle = maps.shape[3] // 2
        sides = [part.mean((2, 3)) for part in (maps[..., :middle], maps[..., middle:])]
        scores: Tensor = self.head(torch.cat(sides, 1))
        return scores


class Wherever(nn.Module):
    """A network that does not care where things are, nor which way round."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.conv(images).relu().mean((2, 3)))
        return scores


def textures(count: int, side: int = 16) -> Tensor:
    """Noise of another brightness in each picture."""
    generator = torch.Generator().manual_seed(0)
    bright = torch.rand(count, 3, 1, 1, generator=generator)
    return bright + 0.05 * torch.randn(count, 3, side, side, generator=generator)


def varied_by(network: nn.Module, inputs: Tensor, batch: int = 16) -> VariedImages | None:
    torch.manual_seed(0)
    images, loader = hold(as_images(inputs), Loader(batch)), Loader(batch)
    return varied(images, prepare(network.eval(), inputs[:1]), loader, 0)


class Growing(nn.Module):
    """As many outputs as the picture has columns, or one row for each of them."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.conv, self.first = nn.Conv2d(3, 4, 1), first

    def forward(self, images: Tensor) -> Tensor:
        columns = self.conv(images).relu().mean(2)
        rows: Tensor = columns.permute(2, 0, 1) if self.first else columns.transpose(1, 2)
        return rows


def test_outputs_that_cannot_be_told_apart_by_picture_are_not_varied() -> None:
    assert varied_by(Growing(first=True), textures(60), batch=7) is None
    wide, narrow = textures(10), textures(10)[..., :12]
    network = prepare(Growing(first=False).eval(), wide[:1])
    loader = Loader(1)
    images = as_images(list(zip([*wide, *narrow], range(20), strict=True)))
    assert varied(images, network, loader, 0) is None


@pytest.mark.parametrize(("count", "copies"), [(8, 3), (400, 3), (700, 2), (800, 1)])
def test_the_fewer_there_are_the_more_copies(count: int, copies: int) -> None:
    found = varied_by(Wherever(), textures(count))
    assert found is not None
    assert (found.kind, found.copies) == ("moved", copies)
    assert len(found) == count * (1 + copies)


@pytest.mark.parametrize("count", [7, ENOUGH])
def test_very_few_and_enough_stay_as_they_are(count: int) -> None:
    assert varied_by(Wherever(), textures(count)) is None


@pytest.mark.parametrize(("count", "copies"), [(8, 3), (50, 1), (70, 0)])
def test_the_more_work_they_are_the_fewer_copies(
    monkeypatch: pytest.MonkeyPatch, count: int, copies: int
) -> None:
    macs = 32 * 32 * 3 * 8 + 8 * 4
    monkeypatch.setattr("compress.pipeline.variation.MOST_MACS", 100 * macs)
    found = varied_by(Wherever(), textures(count, 32))
    assert (found.copies if found is not None else 0) == copies


def test_pictures_that_the_network_does_not_know_are_left_out() -> None:
    inputs = textures(100)
    inputs[::2, :, :, :8] += 1  # a bright side is always the left one
    found = varied_by(Sided(), inputs)
    assert found is not None
    assert found.kind == "shifted"
    # Where both sides are bright as often, a mirrored picture is as good as another.
    inputs[::4] = inputs[::4].flip(3)
    found = varied_by(Sided(), inputs)
    assert found is not None
    assert found.kind == "moved"


def test_what_is_no_picture_stays_as_it_is() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(20, 4))
    assert varied_by(network, torch.randn(40, 20)) is None
    many = nn.Sequential(nn.Conv2d(5, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert varied_by(many, torch.randn(40, 5, 16, 16)) is None


def run(output: Path, *flags: str) -> dict[str, object]:
    arguments = [
        "run", str(DEMO / "digits-width32.safetensors"),
        "--model", "compress.demo_data.network:width32",
        "--data", f"tensors:{DEMO / 'digits-train.npz'}", "--resize", "28",
        "--calibration-images", "80", "--macs", "0.5", "--no-latency", "--no-refit",
        "--output", str(output), *flags,
    ]  # fmt: skip
    found = CliRunner().invoke(cli, arguments)
    assert found.exit_code == 0, found.output
    split: dict[str, object] = json.loads((output / "report.json").read_text())["result"]["split"]
    return split


def test_digits_are_shifted_but_not_mirrored(tmp_path: Path) -> None:
    split = run(tmp_path / "varied")
    assert (split["augmentation"], split["copies"], split["fit_images"]) == ("shifted", 3, 60)
    page = (tmp_path / "varied/report.html").read_text()
    assert "each of the fit images also 3 times shifted" in page
    split = run(tmp_path / "plain", "--no-augment")
    assert (split["augmentation"], split["copies"], split["fit_images"]) == ("none", 0, 60)
    assert "times shifted" not in (tmp_path / "plain/report.html").read_text()


def test_statistics_of_other_pictures_are_not_taken(tmp_path: Path) -> None:
    statistics = ("--calibration", str(tmp_path / "statistics.safetensors"))
    run(tmp_path / "first", *statistics)
    run(tmp_path / "again", *statistics)
    found = CliRunner().invoke(cli, ["run", "--config", str(tmp_path / "first/config.toml"),
                                     *statistics, "--no-augment",
                                     "--output", str(tmp_path / "other")])  # fmt: skip
    assert found.exit_code == 3
    assert "was made with other data" in found.output
    assert not (tmp_path / "other").exists()
