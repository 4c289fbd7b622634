"""Bad input through the command line: one clear paragraph, the right code, nothing left behind."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from workbench import SOURCE, SPEC, Workbench, command, made_images, paragraph, trained

NETWORK = trained()


class Exploit:
    """What an attacker's pickle holds: unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def truncated_torch(path: Path) -> None:
    torch.save(NETWORK.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-500])


def other_weights(**changed: torch.Tensor) -> Callable[[Path], None]:
    return lambda path: save_file({**NETWORK.state_dict(), **changed}, path)


# What stands at the checkpoint's place.
BAD_CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "truncated header": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "truncated torch": truncated_torch,
    "web page": lambda path: path.write_bytes(
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n" * 20
    ),
    "architecture": lambda path: save_file(
        {f"layer.{k}": v for k, v in NETWORK.state_dict().items()}, path
    ),
    "classes": other_weights(
        **{k: v[:2].clone() for k, v in NETWORK.state_dict().items() if k.startswith("head")}
    ),
    "nan": other_weights(
        **{"conv2.weight": torch.full_like(NETWORK.state_dict()["conv2.weight"], torch.nan)}
    ),
    "no tensors": lambda path: torch.save({"epoch": 3}, path),
    "code": lambda path: path.write_bytes(
        pickle.dumps({"state_dict": Exploit(path.parent / "owned")})
    ),
    "torch code": lambda path: torch.save({"state_dict": Exploit(path.parent / "owned")}, path),
}


def bad_checkpoint(kind: str, bench: Workbench) -> str:
    path = Path(bench.checkpoint)
    if kind == "missing":
        return str(bench.folder / "wieghts.safetensors")
    if kind == "folder":
        return str(bench.folder)
    if kind in ("web page", "code", "torch code"):
        path = path.with_suffix(".pt")
    BAD_CHECKPOINTS[kind](path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", ["wieghts.safetensors", "No such file"]),
        ("folder", ["is a folder"]),
        ("empty", ["is empty (0 bytes)"]),
        ("truncated", ["truncated"]),
        ("truncated header", ["truncated"]),
        ("truncated torch", ["truncated", "damaged"]),
        ("web page", ["holds text", "neither safetensors nor a file of torch.save"]),
        ("architecture", ["does not belong to this model", "conv1.weight", "layer.conv1.weight"]),
        ("classes", ["head.weight", "pass ?num_classes=2"]),
        ("nan", ["conv2.weight", "NaN"]),
        ("no tensors", ["tensors"]),
        ("code", ["code"]),
        ("torch code", ["code"]),
    ],
)
def test_bad_checkpoints(bench: Workbench, kind: str, words: list[str]) -> None:
    path = bad_checkpoint(kind, bench)
    text = paragraph(bench.run("--energy", "0.9", checkpoint=path), 3)
    for word in words:
        assert word in text
    assert bench.leftovers() == []  # and nothing that the pickle would have made
    for name in ("inspect", "evaluate", "plan"):
        extra = ["--data", bench.train] if name != "inspect" else []
        assert paragraph(command(name, path, "--model", SPEC, *extra), 3) == text
    assert bench.leftovers() == []


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("torchvision:resnet81", ["resnet81", "Did you mean", "resnet18"]),
        (f"{SOURCE}:tinny", ["tinny", "Did you mean 'tiny'"]),
        (f"{SOURCE.parent / 'tniy.py'}:tiny", ["tniy.py", "Did you mean 'tiny.py'"]),
        (f"{SOURCE}:tiny?num_clases=3", ["num_clases", "Did you mean 'num_classes'"]),
        ("torchvison:resnet18", ["torchvision"]),
        ("resnet18", ["is not a spec"]),
        (f"{SOURCE}:closeness", ["cannot be called"]),
    ],
)
def test_wrong_model_specs(bench: Workbench, spec: str, words: list[str]) -> None:
    text = paragraph(bench.run("--energy", "0.9", model=spec), 3)
    for word in words:
        assert word in text
    assert bench.leftovers() == []


def image_folder(folder: Path, classes: tuple[str, ...] = ("a", "b", "c"), count: int = 8) -> str:
    images, _ = made_images(count * len(classes))
    for index, pixels in enumerate(images):
        place = folder / classes[index % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{index:03}.png")
    return f"imagefolder:{folder}"


def test_image_folders(bench: Workbench, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("images")
    good = image_folder(folder / "good")
    ranks = ("--rank", "conv2=4")
    assert bench.run(*ranks, data=good, test=good).exit_code == 0
    warnings = bench.report()["result"]["warnings"]
    assert any("test images are the calibration images" in w for w in warnings)
    (folder / "empty").mkdir()
    text = paragraph(bench.run(*ranks, "--force", data=f"imagefolder:{folder / 'empty'}"), 3)
    assert "empty" in text
    text = paragraph(bench.run(*ranks, "--force", data=f"imagefolder:{folder / 'god'}"), 3)
    assert "god" in text
    one = image_folder(folder / "one", classes=("a",))
    text = paragraph(bench.run(*ranks, "--force", data=good, test=one), 3)
    assert "of one class ('a')" in text
    bad = image_folder(folder / "bad")
    broken = folder / "bad" / "b" / "001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    text = paragraph(bench.run(*ranks, "--force", data=bad), 3)
    assert "001.png" in text
    text = paragraph(bench.run(*ranks, "--force", data=good, test=bad), 3)
    assert "001.png" in text
    # Whatever failed, the first result still stands.
    assert bench.leftovers() == ["out"]
    assert command("evaluate", str(bench.output()), "--model", SPEC, "--test", good).exit_code == 0


def test_class_folders_whose_names_are_no_text_or_act_on_a_terminal(
    bench: Workbench, tmp_path_factory: pytest.TempPathFactory
) -> None:
    classes = ("a\x1b[31m", os.fsdecode(b"b\xff"), "c")
    try:
        data = image_folder(tmp_path_factory.mktemp("images"), classes)
    except OSError:
        pytest.skip("the file system takes no such names")
    assert bench.run("--rank", "conv2=1", data=data, test=data).exit_code == 0
    assert bench.report()["result"]["test"]["classes"] == ["a\x1b[31m", "b\\xff", "c"]
    found = command("report", str(bench.output()))
    assert found.exit_code == 0
    assert not {c for c in found.stdout if c != "\n" and not c.isprintable()}


def test_labels_out_of_range_and_missing(bench: Workbench) -> None:
    images, labels = made_images(24)
    np.savez(bench.folder / "test.npz", images=images, labels=labels + 1)
    text = paragraph(bench.run("--rank", "conv2=4"), 3)
    assert "has label 3, but there are 3 outputs" in text
    np.savez(bench.folder / "test.npz", images=images)
    assert "no labels" in paragraph(bench.run("--rank", "conv2=4"), 3)
    assert bench.leftovers() == []


def test_images_of_the_wrong_shape(bench: Workbench) -> None:
    images = np.zeros((6, 8, 8, 3), dtype=np.uint8)
    np.savez(bench.folder / "train.npz", images=images, labels=np.arange(6) % 3)
    text = paragraph(bench.run("--rank", "conv2=4"), 3)
    assert "3 channels, the network takes 1" in text
    np.savez(bench.folder / "train.npz", images=np.zeros((6, 2, 2), dtype=np.uint8))
    text = paragraph(bench.run("--rank", "conv2=4"), 3)
    assert "forward failed on an input of shape (1, 1, 2, 2)" in text
    assert bench.leftovers() == []


def test_activations_that_overflow_name_the_layer(bench: Workbench) -> None:
    images, labels = made_images(48)
    images[np.arange(48) != 20] = 0  # the first image that is fitted on passes, one does not
    np.savez(bench.folder / "train.npz", images=images, labels=labels)
    spec = f"{SPEC}?poison=true"
    text = paragraph(bench.run("--energy", "0.9", "--batch-size", "1", model=spec), 3)
    assert "'conv2'" in text
    assert "NaN or infinite activations" in text
    assert bench.leftovers() == []


def test_a_model_that_gives_nan_on_the_first_image(bench: Workbench) -> None:
    state = NETWORK.state_dict()
    save_file({**state, "norm.running_var": -torch.ones(8)}, bench.checkpoint)
    text = paragraph(bench.run("--energy", "0.9"), 3)
    assert "NaN or infinite outputs on the first image" in text
    assert bench.leftovers() == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rank", "conv3=4"], ["--rank 'conv3' matches no layer", "Did you mean"]),
        (["--keep", "cnv1"], ["--keep 'cnv1' matches no layer", "conv1"]),
        (["--rank", "conv1=4", "--keep", "conv1"], ["both kept and given a rank"]),
        (["--rank", "conv1=4,4", "--scheme", "conv1=output"], ["takes 1 rank(s)"]),
        (["--scheme", "head=spatial"], ["'head' cannot take 'spatial'"]),
    ],
)
def test_overrides_that_fit_no_layer(bench: Workbench, flags: list[str], words: list[str]) -> None:
    text = paragraph(bench.run(*flags), 2)
    for word in words:
        assert word in text
    assert bench.leftovers() == []


# --- The output --------------------------------------------------------------------------------


def test_existing_outputs_are_refused(bench: Workbench) -> None:
    ranks = ("--rank", "conv2=4")
    assert bench.run(*ranks).exit_code == 0
    model = bench.output() / "model.safetensors"
    first = model.read_bytes()
    text = paragraph(bench.run("--rank", "conv2=2"), 3)
    assert "already holds a result; pass --force" in text
    assert model.read_bytes() == first
    assert bench.run("--rank", "conv2=2", "--force").exit_code == 0
    assert model.read_bytes() != first
    (bench.folder / "mine").mkdir()
    (bench.folder / "mine" / "thesis.tex").write_text("years of work")
    text = paragraph(bench.run(*ranks, "--force", output=str(bench.folder / "mine")), 3)
    assert "thesis.tex" in text
    text = paragraph(bench.run(*ranks, "--force", output=bench.checkpoint), 3)
    assert "would replace the input" in text
    (bench.folder / "a file").write_text("years of work")
    text = paragraph(bench.run(*ranks, "--force", output=str(bench.folder / "a file")), 3)
    assert "is a file" in text
    (bench.folder / "a file").unlink()
    assert "No output given" in paragraph(bench.run(*ranks, output=None), 2)
    assert bench.leftovers() == ["mine", "out"]


def test_an_output_never_replaces_an_input(bench: Workbench) -> None:
    """Names that a result may hold as well, so that --force alone would not save them."""
    folder = bench.output()
    folder.mkdir()
    inputs = {
        "checkpoint": folder / "model.safetensors",
        "data": folder / "report.npz",
        "calibration": folder / "calibration.safetensors",
    }
    inputs["checkpoint"].write_bytes(Path(bench.checkpoint).read_bytes())
    images, labels = made_images(24)
    np.savez(inputs["data"], images=images, labels=labels)
    for given in (
        {"checkpoint": str(inputs["checkpoint"])},
        {"data": f"tensors:{inputs['data']}?stop=20"},
        {"calibration": str(inputs["calibration"])},
    ):
        text = paragraph(bench.run("--rank", "conv2=4", "--force", **given), 3)
        assert f"would replace the input {inputs[next(iter(given))]}" in text
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "report.npz"]
    plan = ("plan", bench.checkpoint, "--model", SPEC, "--data", bench.train, "--force")
    before = Path(bench.checkpoint).read_bytes()
    assert "would replace" in paragraph(command(*plan, "--output", bench.checkpoint), 3)
    assert Path(bench.checkpoint).read_bytes() == before
    sweep = ("sweep", bench.checkpoint, "--model", SPEC, "--data", bench.train)
    text = paragraph(command(*sweep, "--macs", "0.5", "--output", str(bench.folder)), 3)
    assert "holds" in text


def test_a_calibration_in_no_folder_is_refused_before_the_work(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("calibrated")

    monkeypatch.setattr("compress.pipeline.job.calibrate", forbidden)
    file = str(bench.folder / "missing" / "cal.safetensors")
    text = paragraph(bench.run("--energy", "0.9", calibration=file), 3)
    assert f"no folder {bench.folder / 'missing'}" in text
    assert bench.leftovers() == []


def test_unwritable_outputs(bench: Workbench) -> None:
    # Root may write anywhere, but nobody below a file or in /proc.
    for place in (f"{bench.checkpoint}/out", "/proc/out"):
        text = paragraph(bench.run("--rank", "conv2=4", output=place), 3)
        assert "cannot be written" in text or "is a file" in text
    assert bench.leftovers() == []


@pytest.mark.parametrize("what", ["model.safetensors", "report.html"])
def test_a_full_disk(bench: Workbench, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    real = os.replace

    def full(source: str | Path, target: str | Path) -> None:
        if Path(target).name == what:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        real(source, target)

    monkeypatch.setattr("os.replace", full)
    text = paragraph(bench.run("--rank", "conv2=4"), 3)
    assert text.count("No space left on device") == 1
    assert text.count("free some space") == 1
    assert f"{bench.output()} cannot be written" in text
    assert ".partial" not in text
    # What was worked out until then, which the message names.
    assert bench.leftovers() == ["out.unfinished"]
    assert "out.unfinished" in text


def test_a_full_disk_spares_the_result_that_stood_there(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench.run("--rank", "conv2=4").exit_code == 0
    before = {p.name: p.read_bytes() for p in bench.output().iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    paragraph(bench.run("--rank", "conv2=2", "--force"), 3)
    assert {p.name: p.read_bytes() for p in bench.output().iterdir()} == before
    assert bench.leftovers() == ["out"]


@pytest.mark.parametrize(
    "sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["Ctrl-C", "SIGTERM", "SIGHUP"]
)
def test_a_process_stopped_in_the_middle(bench: Workbench, sent: signal.Signals) -> None:
    """A real process gets a signal while it calibrates, said by a marker that its data writes."""
    slow = bench.folder / "slow.py"
    slow.write_text(
        "import time, pathlib, torch\n"
        "class Slow(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 64\n"
        "    def __getitem__(self, i):\n"
        "        if i > 40:\n"
        f"            pathlib.Path({str(bench.folder / 'reached')!r}).touch()\n"
        "            time.sleep(0.5)\n"
        "        return torch.rand(1, 8, 8), i % 3\n"
        "def slow(): return Slow()\n"
    )
    words = ["run", bench.checkpoint, "--model", SPEC, "--data", f"{slow}:slow", "--test",
             f"{slow}:slow", "--output", str(bench.output()), "--energy", "0.9"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    # Tests started in the background of a shell inherit an ignored SIGINT, and hand it on.
    with subprocess.Popen(
        [sys.executable, "-m", "compress.commands", *words],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        preexec_fn=partial(signal.signal, sent, signal.SIG_DFL),
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while not (bench.folder / "reached").exists():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(sent)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, stderr
    assert stderr.strip() == "Interrupted; nothing was left behind."
    assert stdout == ""
    assert bench.leftovers() == ["reached", "slow.py"]
