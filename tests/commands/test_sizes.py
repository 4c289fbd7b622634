"""Pictures of a height and a width that differ, through the commands that read pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from workbench import SPEC, Workbench, command, made_images, paragraph

from compress.artefact.manifest import read_manifest
from compress.config import make_config, read_toml
from compress.inputs.load import preprocessing_of
from compress.vision.preprocessing import Preprocessing


def folder_of_pictures(folder: Path, count: int = 24) -> str:
    """Grey pictures by class, wider than high, of two sizes."""
    images, labels = made_images(count)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / "abc"[label]
        place.mkdir(parents=True, exist_ok=True)
        wide = np.repeat(image, 2 + index % 2, axis=1)
        Image.fromarray(wide).save(place / f"{index}.png")
    return f"imagefolder:{folder}"


def test_a_height_and_a_width_hold_from_the_run_to_the_measurement(bench: Workbench) -> None:
    data = folder_of_pictures(bench.folder / "pictures")
    # A lone number keeps the two aspect ratios apart, which one batch cannot hold.
    grey = ("--mean", "0", "--std", "1", "--rank", "conv2=2", "--no-refit")
    assert "pass --resize H,W" in paragraph(bench.run("--resize", "6", *grey, data=data), 3)
    given = (*grey, "--resize", "6,12")
    run = bench.run(*given, data=data, test=data)
    assert run.exit_code == 0, run.stderr
    assert read_manifest(bench.output()).settings["resize"] == [6, 12]
    assert make_config(read_toml(bench.output() / "config.toml")).resize == (6, 12)
    macs = bench.report()["result"]["cost"]["original"]["macs"]

    # A result says itself how its pictures are made, and its configuration repeats the run.
    again = ("evaluate", str(bench.output()), "--model", SPEC, "--test", data, "--json")
    evaluated = command(*again, "--no-latency")
    assert evaluated.exit_code == 0, evaluated.stderr
    verified = command(
        "verify", str(bench.output()), "--checkpoint", bench.checkpoint, "--model", SPEC,
        "--test", data, "--no-latency",
    )  # fmt: skip
    assert verified.exit_code == 0, verified.stderr
    plain = command("inspect", bench.checkpoint, "--model", SPEC, "--resize", "6,12", "--json")
    assert json.loads(plain.stdout)["input_shapes"] == [[1, 6, 12]]
    assert json.loads(plain.stdout)["original"]["macs"] == macs
    sized = command("inspect", bench.checkpoint, "--model", SPEC, "--crop", "6,12", "--json")
    assert json.loads(sized.stdout)["input_shapes"] == [[1, 6, 12]]


def test_a_sweep_takes_a_height_and_a_width(bench: Workbench) -> None:
    data = folder_of_pictures(bench.folder / "pictures")
    swept = command(
        "sweep", bench.checkpoint, "--model", SPEC, "--data", data, "--test", data, "--mean", "0",
        "--std", "1", "--resize", "6,12", "--macs", "0.8", "--no-refit", "--no-latency",
        "--output", str(bench.output()),
    )  # fmt: skip
    assert swept.exit_code == 0, swept.stderr
    assert read_toml(bench.output() / "config.toml")["resize"] == [6, 12]


@pytest.mark.parametrize("size", ["64,", "a", "1,2,3", "64x256", "6.5", "-3"])
def test_a_size_that_is_none_is_refused_with_what_one_looks_like(size: str) -> None:
    done = command("inspect", "x.pt", "--model", "m:f", f"--resize={size}")
    assert "a height and a width such as 64,256" in paragraph(done, 2)


def test_a_size_of_nothing_is_refused(bench: Workbench) -> None:
    assert "crop = (0, 4) holds" in paragraph(bench.run("--crop", "0,4"), 2)


def test_an_exact_size_replaces_the_crop_of_a_preset_and_nothing_else() -> None:
    preset = Preprocessing((0.5,), (0.2,), 256, 224, "bicubic", from_preset=True)
    wide = preprocessing_of(make_config({"resize": [64, 256]}), preset)
    assert (wide.resize, wide.crop, wide.mean) == ((64, 256), None, (0.5,))
    both = preprocessing_of(make_config({"resize": [64, 256], "crop": [60, 250]}), preset)
    assert both.crop == (60, 250)
    assert preprocessing_of(make_config({"resize": 64}), preset).crop == 224
