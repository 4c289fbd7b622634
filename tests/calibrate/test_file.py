"""A calibration on disk: the same statistics, or a refusal that says what differs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks.tiny import tiny
from safetensors.torch import save_file

from compress.calibrate.collect import calibrate
from compress.calibrate.file import CalibrationKey, read_calibration, write_calibration
from compress.calibrate.recipe import Recipe
from compress.calibrate.statistics import Calibration, Source
from compress.errors import CalibrationError
from compress.network.baseline import Network, prepare

KEY = CalibrationKey("model", "data", {"seed": 0, "statistics": ["output", "spatial"]})


@pytest.fixture(scope="module")
def network() -> Network:
    return prepare(tiny(), torch.rand(1, 1, 8, 8))


@pytest.fixture(scope="module")
def calibration(network: Network) -> Calibration:
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return calibrate(
        network.model,
        network.sites,
        [(images, torch.zeros(16))],
        Source(16),
        Recipe(schemes=("output", "spatial"), weigh=True),
    )


def test_what_is_read_is_what_was_written(calibration: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "cal.safetensors"
    write_calibration(file, calibration, KEY)
    found = read_calibration(file, KEY)
    assert (found.source.images, found.metric) == (16, "loss")
    assert (found.source.data, found.source.model) == ("data", "model")
    assert found.statistics.keys() == calibration.statistics.keys()
    for name, statistics in calibration.statistics.items():
        moments = found.statistics[name].moments()
        assert moments.keys() == statistics.moments().keys()
        for role, own in statistics.moments().items():
            assert moments[role].count == own.count
            assert torch.equal(moments[role].mean, own.mean)
            assert torch.equal(moments[role].covariance, own.covariance)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_statistics_for_more_schemes_serve_fewer(calibration: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "cal.safetensors"
    write_calibration(file, calibration, KEY)
    fewer = CalibrationKey("model", "data", {**KEY.settings, "statistics": ["output"]})
    assert read_calibration(file, fewer).statistics.keys() == calibration.statistics.keys()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (CalibrationKey("other", "data", KEY.settings), "with other model"),
        (CalibrationKey("model", "other", KEY.settings), "with other data"),
        (CalibrationKey("model", "data", {**KEY.settings, "seed": 1}), "seed: 0 there, 1 here"),
        (CalibrationKey("model", "data", {"seed": 0, "statistics": ["input"]}), "statistics"),
    ],
)
def test_other_inputs_are_refused(
    calibration: Calibration, tmp_path: Path, key: CalibrationKey, message: str
) -> None:
    file = tmp_path / "cal.safetensors"
    write_calibration(file, calibration, KEY)
    with pytest.raises(CalibrationError, match=message):
        read_calibration(file, key)


def test_fewer_schemes_find_all_they_need(calibration: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "cal.safetensors"
    write_calibration(file, calibration, KEY)
    found = read_calibration(
        file, CalibrationKey("model", "data", {"seed": 0, "statistics": ["output"]})
    )
    assert found.source.images == 16


def test_damaged_and_foreign_files_are_refused(calibration: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "cal.safetensors"
    write_calibration(file, calibration, KEY)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_calibration(file, KEY)
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(CalibrationError, match="is not a calibration"):
        read_calibration(file, KEY)
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_calibration(tmp_path / "none.safetensors", KEY)
