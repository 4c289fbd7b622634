"""A calibration on disk: the same statistics, or a refusal that says what differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks.tiny import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress.calibrate.collect import calibrate
from compress.calibrate.file import CalibrationKey, read_calibration, write_calibration
from compress.calibrate.recipe import Recipe
from compress.calibrate.statistics import Calibration, Source, misfits
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


@pytest.mark.parametrize("dropped", ["", "conv2|inputs"])
def test_statistics_that_miss_a_layer_or_its_shape_are_named(
    network: Network, calibration: Calibration, dropped: str
) -> None:
    assert misfits(network, calibration) == []
    statistics = dict(calibration.statistics)
    if dropped:
        del statistics["conv2"]
    else:
        statistics["conv2"] = statistics["conv1"]
    assert misfits(network, replace(calibration, statistics=statistics)) == ["conv2"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"conv2|inputs|mean": torch.zeros(1, 50_000, dtype=torch.float64)}, "do not fit"),
        ({"conv2|inputs|mean": torch.zeros(1, 72)}, "do not fit"),
        ({"conv2|inputs|count": torch.tensor(-1)}, "numbers that no statistics have"),
        ({"conv2|inputs|scatter": torch.full((1, 72, 72), torch.nan).double()}, "numbers that no"),
        ({"conv2|moments|mean": torch.zeros(1, 72)}, "none of a calibration's"),
        ({"conv2": torch.zeros(1)}, "none of a calibration's"),
        ({"a|weighting|mean": torch.zeros(1, 2)}, "holds mean"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(
    calibration: Calibration, tmp_path: Path, changed: dict[str, torch.Tensor], message: str
) -> None:
    file = tmp_path / "cal.safetensors"
    write_calibration(file, calibration, KEY)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({**load_file(file), **changed}, file, metadata)
    with pytest.raises(CalibrationError, match=message):
        read_calibration(file, KEY)
