"""A calibration on disk: the same statistics, or a refusal that says what differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import flipped, metadata_of, resealed, write_sealed
from networks.tiny import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.calibrate.collect import calibrate
from compress.calibrate.file import CalibrationKey, read_calibration, write_calibration
from compress.calibrate.recipe import Recipe
from compress.calibrate.statistics import Calibration, LayerStatistics, Source, misfits
from compress.errors import CalibrationError
from compress.linalg.moments import Moments
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


# --- Damage ------------------------------------------------------------------------------------

KEY_IN_HEADER = "compress_calibration"


@pytest.fixture
def file(calibration: Calibration, tmp_path: Path) -> Path:
    path = tmp_path / "cal.safetensors"
    write_calibration(path, calibration, KEY)
    return path


def test_no_flipped_bit_is_accepted(file: Path) -> None:
    for stop in (None, 2000):
        for _ in flipped(file, 500, stop=stop):
            with pytest.raises(CalibrationError, match=r"cal\.safetensors"):
                read_calibration(file, KEY)
    assert read_calibration(file, KEY).source.images == 16


def test_equal_statistics_are_equal_bytes(calibration: Calibration, file: Path) -> None:
    other = file.with_name("other.safetensors")
    write_calibration(other, calibration, KEY)
    assert other.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("change", [torch.zeros_like, torch.neg], ids=["zeroed", "negated"])
def test_edited_statistics_are_refused(file: Path, change: Callable[[Tensor], Tensor]) -> None:
    tensors, metadata = load_file(file), metadata_of(file)
    tensors["conv2|inputs|scatter"] = change(tensors["conv2|inputs|scatter"])
    save_file(tensors, file, metadata)
    with pytest.raises(CalibrationError, match=r"damaged or edited since .*delete it"):
        read_calibration(file, KEY)


def test_an_edited_header_is_refused(file: Path) -> None:
    tensors, metadata = load_file(file), metadata_of(file)
    header = {**json.loads(metadata[KEY_IN_HEADER]), "images": 99}
    save_file(tensors, file, {**metadata, KEY_IN_HEADER: json.dumps(header)})
    with pytest.raises(CalibrationError, match="damaged or edited"):
        read_calibration(file, KEY)


def test_files_without_a_digest_are_refused(file: Path) -> None:
    tensors, header = load_file(file), metadata_of(file)[KEY_IN_HEADER]
    save_file(tensors, file, {KEY_IN_HEADER: header})
    with pytest.raises(CalibrationError, match=r"no digest.*delete it to calibrate anew"):
        read_calibration(file, KEY)
    old = json.dumps({**json.loads(header), "format": 2})
    save_file(tensors, file, {KEY_IN_HEADER: old})
    with pytest.raises(CalibrationError, match=r"format 2.*delete it to calibrate anew"):
        read_calibration(file, KEY)


def _asymmetric(scatter: Tensor) -> Tensor:
    scatter[0, 0, -1] += float(scatter.abs().max())
    return scatter


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scatter", torch.neg, "negative variances"),
        ("scatter", _asymmetric, "not symmetric"),
        ("scatter", lambda t: t * float("nan"), "NaN or infinite"),
        ("mean", lambda t: t + float("inf"), "NaN or infinite"),
        ("mean", lambda t: t * 0 + 1e200, "too large to compute with"),
        ("scatter", lambda t: t[:, 1:].clone(), "do not belong together"),
        ("mean", lambda t: t[0].clone(), "do not belong together"),
        ("mean", lambda t: t.float(), "do not belong together"),
        ("count", lambda t: -t, "a count of -"),
        ("count", lambda t: t * 0, "a count of 0"),
        ("count", lambda t: t.double(), "do not belong together"),
    ],
)
def test_statistics_that_cannot_be_are_refused(
    file: Path, part: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    """Sealed again: what they say is checked as well."""
    tensors, metadata = load_file(file), metadata_of(file)
    name = f"conv2|inputs|{part}"
    tensors[name] = change(tensors[name])
    write_sealed(file, tensors, {KEY_IN_HEADER: metadata[KEY_IN_HEADER]})
    with pytest.raises(CalibrationError, match=rf"inputs of layer 'conv2'.*{message}"):
        read_calibration(file, KEY)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("images"),
        lambda h: h.update(images="many"),
        lambda h: h.update(images=0),
        lambda h: h.update(metric="taste"),
    ],
)
def test_headers_that_cannot_be_are_refused(
    file: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    resealed(file, KEY_IN_HEADER, change)
    with pytest.raises(CalibrationError, match="is not a calibration"):
        read_calibration(file, KEY)


@pytest.mark.parametrize("name", ["weight", "conv2|surprise|mean", "conv2|inputs|median"])
def test_foreign_tensors_are_refused(file: Path, name: str) -> None:
    tensors, metadata = load_file(file), metadata_of(file)
    tensors[name] = torch.zeros(2)
    write_sealed(file, tensors, {KEY_IN_HEADER: metadata[KEY_IN_HEADER]})
    with pytest.raises(CalibrationError, match="is not a calibration"):
        read_calibration(file, KEY)


def test_layers_that_no_image_reached_are_read_back(
    calibration: Calibration, tmp_path: Path
) -> None:
    unseen = LayerStatistics(inputs=Moments(1, 4), weighting=Moments(1, 2))
    known = replace(calibration, statistics={**calibration.statistics, "unseen": unseen})
    write_calibration(tmp_path / "cal.safetensors", known, KEY)
    assert read_calibration(tmp_path / "cal.safetensors", KEY).statistics["unseen"].samples == 0


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
