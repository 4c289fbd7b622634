"""Files of somebody else's run nothing, fetch nothing and fill no memory unasked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from damage import resealed
from PIL import EpsImagePlugin
from workbench import SPEC, Workbench, command, paragraph

import compress
from compress.artefact.manifest import (
    LARGEST_RECORDED_SIDE,
    Manifest,
    read_manifest,
    recorded_settings,
)
from compress.config import Role, settings_of
from compress.errors import ArtefactError, DataError, ModelError
from compress.inputs.checkpoint.reading import ARTEFACT_KEY
from compress.trust import data_risk, model_risk, require_trusted_model, setting_risks
from compress.vision.pictures import read_image
from compress.vision.preprocessing import Preprocessing, pixels_to_tensor

EVIL = "(Path(__file__).parent / 'ran').touch()"


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with code that leaves a trace when it is run."""
    folder = tmp_path / "compress.demo_data.network:x"
    folder.mkdir()
    (folder / "evil.py").write_text(f"from pathlib import Path\n{EVIL}\n")
    monkeypatch.chdir(tmp_path)
    return folder / "ran"


@pytest.mark.parametrize(
    "spec",
    [
        "torchvision:resnet18",
        "torchvision:resnet18?num_classes=3",
        "torchvision:googlenet?num_classes=3&aux_logits=false",
        "torchvision:mobilenet_v2?width_mult=0.5",
        "compress.demo_data.network:width32",
        "compress.demo_data.network:width32?width=8",
    ],
)
def test_harmless_models(spec: str) -> None:
    assert model_risk(spec) == ""
    require_trusted_model(spec, "It", ModelError)


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("compress.demo_data.network:x/evil.py:net", "runs the code"),
        ("compress.demo_data.network:width32:net", "runs the code"),
        ("compress.demo_data.network:nn.Module", "runs the code"),
        ("compress.demo_data.network:annotations", "runs the code"),
        ("compress.demo_data.network:width32?a=1?b=2", "runs the code"),
        ("compress.demo_data.network:width32?width=[1]", "passes"),
        ("compress.demo_data.networks:width32", "runs the code"),
        (" compress.demo_data.network:width32", "runs the code"),
        ("compress.specs:build_model?spec=theirs.py:net", "runs the code"),
        ("compress.py:net", "runs the code"),
        ("os:system?command=id", "runs the code"),
        ("torchvision.models:resnet18", "runs the code"),
        ("Torchvision:resnet18", "runs the code"),
        ("theirs.py:net", "runs the code"),
        ("torchvision:resnet18?weights=DEFAULT", "download"),
        ("torchvision:resnet18?weights='IMAGENET1K_V1'", "download"),
        ("torchvision:resnet18?weights_backbone=DEFAULT", "download"),
        ("torchvision:mobilenet_v2?inverted_residual_setting=[[1,16,9,1]]", "passes"),
        ("torchvision:resnet18?norm_layer=os.system", "passes"),
    ],
)
def test_models_that_need_trust(spec: str, part: str) -> None:
    assert part in model_risk(spec)
    with pytest.raises(ModelError, match="unasked"):
        require_trusted_model(spec, "It", ModelError)


@pytest.mark.parametrize(
    "spec",
    ["torchvision:resnet18?num_classes=1000000000000", "torchvision:vit_b_16?image_size=160000"],
)
def test_a_file_cannot_ask_for_a_huge_network(spec: str) -> None:
    with pytest.raises(ModelError, match=r"asks for a network of [\d,]+ GiB"):
        require_trusted_model(spec, "It", ModelError)


def test_images_and_functions_that_need_trust() -> None:
    for plain in ("imagefolder:x", "tensors:x.npz?start=3", "idx:a,b"):
        assert data_risk(plain) == ""
    assert "unpickle" in data_risk("torchvision:CIFAR10?root=x")
    assert "runs the code" in data_risk("imagefolder.py:net")
    settings = {
        "model": "a:b", "data": "tensors:x.npz", "test": "c:d", "metric_fn": "e:f",
        "loss_fn": "", "seed": 3,
    }  # fmt: skip
    assert set(setting_risks(settings)) == {"model", "test", "metric_fn"}


def test_every_setting_that_is_a_spec_is_looked_at() -> None:
    specs = {"model", "data", "test", "metric_fn", "loss_fn"}
    # What names code says in its help that it takes a function, or a factory, of the user's.
    from compress.commands.group import cli

    named = {
        option.name
        for each in cli.commands.values()
        for option in each.params
        if "package.module:" in (getattr(option, "help", "") or "")
    }
    named &= set(settings_of(*Role))  # a flag that is no setting comes from the user alone
    assert named | {"test"} == specs
    assert set(setting_risks(dict.fromkeys(specs, "os:system"))) == specs


def edited(folder: Path, **changes: object) -> Path:
    """Change the manifest of a result, and its digest, as a hostile sender would."""
    resealed(folder / "model.safetensors", ARTEFACT_KEY, lambda manifest: manifest.update(changes))
    return folder


HOSTILE = ("compress.demo_data.network:x/evil.py:net", "evil.py:net", "os:getcwd")


@pytest.mark.parametrize("spec", HOSTILE)
def test_a_hostile_result_runs_nothing(bench: Workbench, evil: Path, spec: str) -> None:
    assert bench.run("--rank", "conv2=2").exit_code == 0
    folder = edited(bench.output(), model=spec)
    given = ("--test", bench.test)
    assert "unasked" in paragraph(command("evaluate", str(folder), *given), 3)
    original = ("--checkpoint", bench.checkpoint)
    assert "unasked" in paragraph(command("verify", str(folder), *original, *given), 3)
    report = ("report", "--before", bench.checkpoint, "--after", str(folder), *given)
    assert "unasked" in paragraph(command(*report), 3)
    with pytest.raises(ArtefactError, match="unasked"):
        compress.load(folder)
    assert not evil.exists()


@pytest.mark.parametrize("spec", HOSTILE)
def test_a_hostile_plan_runs_nothing(bench: Workbench, evil: Path, spec: str) -> None:
    plan = bench.folder / "plan.json"
    made = command(
        "plan", bench.checkpoint, "--model", SPEC, "--data", bench.train, "--rank", "conv2=2",
        "--output", str(plan),
    )  # fmt: skip
    assert made.exit_code == 0, made.stderr
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"model": spec}))
    given = ("--checkpoint", bench.checkpoint, "--data", bench.train, "--output", "new")
    assert "unasked" in paragraph(command("apply", str(plan), *given), 2)
    assert not evil.exists()
    assert not Path("new").exists()


def with_setting(folder: Path, name: str, spec: str) -> str:
    file = folder / "config.toml"
    lines = [x for x in file.read_text().splitlines() if not x.startswith(f"{name} =")]
    file.write_text("\n".join([f"{name} = {json.dumps(spec)}", *lines]))
    return str(file)


@pytest.mark.parametrize("name", ["model", "data", "test", "metric_fn", "loss_fn"])
def test_the_configuration_of_a_result_runs_code_only_with_trust(
    bench: Workbench, evil: Path, name: str
) -> None:
    assert bench.run("--rank", "conv2=2", "--test", bench.test).exit_code == 0
    spec = f"{evil.parent / 'evil.py'}:net"
    file = with_setting(bench.output(), name, spec)

    def again(*given: str) -> Result:
        own = () if name == "model" else ("--model", SPEC)
        return command("run", bench.checkpoint, *own, "--config", file, "--output", "new", *given)

    text = paragraph(again(), 2)
    assert f"The setting '{name}'" in text
    assert f"--{name.replace('_', '-')}" in text
    assert not evil.exists()
    assert "no factory" in again("--trust-code").stderr  # evil.py defines nothing
    assert evil.exists()


def test_your_own_spec_on_the_command_line_stays_trusted(bench: Workbench) -> None:
    assert bench.run("--rank", "conv2=2", "--test", bench.test).exit_code == 0
    file = str(bench.output() / "config.toml")
    given = ("run", bench.checkpoint, "--config", file, "--output", str(bench.output("new")))
    assert "The setting 'model'" in paragraph(command(*given), 2)
    assert command(*given, "--model", SPEC).exit_code == 0
    # A copy elsewhere is a configuration like any other.
    copy = bench.folder / "mine.toml"
    copy.write_text(Path(file).read_text())
    given = ("run", bench.checkpoint, "--config", str(copy), "--output", str(bench.output("own")))
    assert command(*given).exit_code == 0


def test_a_recorded_size_is_obeyed_within_reason(bench: Workbench) -> None:
    manifest = Manifest("torchvision:resnet18", "", "float32")
    for side in (224, LARGEST_RECORDED_SIDE):
        held = dataclasses.replace(manifest, settings={"resize": side, "crop": side})
        assert recorded_settings(held) == {"resize": side, "crop": side}
    held = dataclasses.replace(manifest, settings={"resize": [64, 256]})
    assert recorded_settings(held) == {"resize": [64, 256]}
    held = dataclasses.replace(manifest, settings={"resize": [64, LARGEST_RECORDED_SIDE + 1]})
    with pytest.raises(ArtefactError, match="pass --resize 64,2049 yourself"):
        recorded_settings(held)
    for name in ("resize", "crop"):
        held = dataclasses.replace(manifest, settings={name: LARGEST_RECORDED_SIDE + 1})
        with pytest.raises(ArtefactError, match=f"pass --{name} 2049 yourself"):
            recorded_settings(held)
    assert bench.run("--rank", "conv2=2").exit_code == 0
    settings = read_manifest(bench.output()).settings
    folder = edited(bench.output(), settings=settings | {"resize": 10**9})
    given = ("evaluate", str(folder), "--model", SPEC, "--test", bench.test)
    assert "1,000,000,000 pixels" in paragraph(command(*given), 3)


def test_a_long_thin_image_does_not_become_a_huge_one() -> None:
    with pytest.raises(DataError, match="would become 2048x20480000"):
        pixels_to_tensor(torch.zeros(1, 1, 10_000), Preprocessing(resize=2048), "thin.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".ppm"])
def test_a_picture_in_another_language_starts_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **_: started.append(a))
    monkeypatch.setattr(EpsImagePlugin, "has_ghostscript", lambda: True)
    file = tmp_path / f"picture{suffix}"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match="cannot be read"):
        read_image(file, 3)
    assert started == []
