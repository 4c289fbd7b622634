"""``compress export``: files that other runtimes load, checked before they are left behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stopwatch import stop_the_clock
from workbench import SPEC, Workbench, command, made_images, paragraph, trained

import compress
from compress.deploy.onnx import OnnxModel, to_onnx
from compress.errors import ModelError

RANKS = ("--rank", "conv1=3", "--rank", "conv2=4")
IMAGES = torch.tensor(made_images(24, seed=2)[0]).unsqueeze(1).float() / 255


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of the workbench's network, made once."""
    once = Workbench.make(tmp_path_factory.mktemp("once"), trained())
    assert once.run(*RANKS, "--no-latency").exit_code == 0
    return once.output()


@pytest.fixture
def made(bench: Workbench, result: Path) -> Workbench:
    """A workbench with a result in ``out``."""
    shutil.copytree(result, bench.output())
    return bench


def exporting(bench: Workbench, *flags: str, name: str = "net.onnx") -> list[str]:
    return [
        "export", str(bench.output()), "--trust-code", "--data", bench.train,
        "--output", str(bench.output(name)), *flags,
    ]  # fmt: skip


def test_an_onnx_file_computes_what_the_result_does(made: Workbench) -> None:
    done = command(*exporting(made, "--test", made.test))
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    session = onnxruntime.InferenceSession(str(made.output("net.onnx")))
    assert [i.name for i in session.get_inputs()] == ["input"]
    model = compress.load(made.output(), trust_code=True)
    for count in (1, 5, 24):
        (found,) = session.run(["output"], {"input": IMAGES[:count].numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(found), model(IMAGES[:count]))
    for words in (
        "ONNX, opset 20", "batches of any size", "output    [3]", "on 48 images",
        "Same predictions: 100.00%", "onnxruntime", "Medians",
    ):  # fmt: skip
        assert words in done.stdout
    after = made.report()["result"]["test"]["top1_after"]
    assert f"on 24 test images: {after:.2%} in torch, {after:.2%} exported" in done.stdout
    assert made.leftovers() == ["net.onnx", "out"]


def test_a_program_is_not_compiled_without_a_compiler(
    made: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.deploy.compiled.shutil.which", lambda _: None)
    said = paragraph(command(*exporting(made, "--to", "aoti", name="net.pt2")), 2)
    assert "--to aoti needs a C++ compiler" in said
    assert not made.output("net.pt2").exists()


def test_the_file_carries_the_manifest(made: Workbench) -> None:
    assert command(*exporting(made, "--no-latency")).exit_code == 0
    with safe_open(made.output() / "model.safetensors", "pt") as file:
        manifest = file.metadata()["compress"]
    stored = {p.key: p.value for p in onnx.load(made.output("net.onnx")).metadata_props}
    assert stored == {"compress": manifest}
    assert json.loads(manifest)["source_sha256"]


def test_a_program_runs_where_this_package_is_not_installed(made: Workbench) -> None:
    done = command(*exporting(made, "--to", "pt2", "--no-latency", name="net.pt2"))
    assert done.exit_code == 0, done.stderr
    assert "torch.export" in done.stdout
    inputs, outputs = made.folder / "inputs.pt", made.folder / "outputs.pt"
    torch.save(IMAGES[:7], inputs)
    code = (
        "import sys; sys.modules['compress'] = None\n"
        "import torch\n"
        "extra = {'compress.json': ''}\n"
        f"program = torch.export.load({str(made.output('net.pt2'))!r}, extra_files=extra)\n"
        "assert program.example_inputs is None\n"  # nobody's images are in the file
        f"found = program.module()(torch.load({str(inputs)!r}, weights_only=True))\n"
        f"torch.save(found, {str(outputs)!r})\n"
        "print(extra['compress.json'])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["model"] == SPEC
    model = compress.load(made.output(), trust_code=True)
    with torch.no_grad():
        expected = model(IMAGES[:7])
    torch.testing.assert_close(torch.load(outputs, weights_only=True), expected)


def test_a_checkpoint_that_was_never_compressed_is_exported_too(bench: Workbench) -> None:
    done = command(
        "export", bench.checkpoint, "--model", SPEC, "--data", bench.train,
        "--output", str(bench.output("net.onnx")), "--fixed-batch", "5", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["batch"], said["images"], said["inputs"]) == (5, 45, ["input"])
    assert said["outputs"][0]["largest"] < 1e-5
    assert [t["batch_size"] for t in said["times"]] == [5] * len(said["times"])
    proto = onnx.load(bench.output("net.onnx"))
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 5
    assert "source_sha256" in proto.metadata_props[0].value


def test_an_existing_file_is_replaced_only_by_force(made: Workbench) -> None:
    made.output("net.onnx").write_text("mine")
    assert "exists; pass --force" in paragraph(command(*exporting(made)), 3)
    assert made.output("net.onnx").read_text() == "mine"
    assert command(*exporting(made, "--force", "--no-latency")).exit_code == 0
    assert len(onnx.load(made.output("net.onnx")).graph.node) > 3


def broken(*arguments: Any) -> OnnxModel:
    """The ONNX model with one weight of the second layer changed."""
    model = to_onnx(*arguments)
    convolutions = [node for node in model.proto.graph.node if node.op_type == "Conv"]
    stored = {tensor.name: tensor for tensor in model.proto.graph.initializer}
    tensor = stored[convolutions[1].input[1]]
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] += 1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


def test_a_file_that_computes_something_else_is_not_left_behind(
    made: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.output("net.onnx").write_text("mine")
    monkeypatch.setattr("compress.deploy.file.to_onnx", broken)
    said = paragraph(command(*exporting(made, "--force")), 1)
    assert "output 'output' differs" in said
    assert "The first value that differs by more is conv2d_1 (Conv)" in said
    assert made.output("net.onnx").read_text() == "mine"
    assert made.leftovers() == ["net.onnx", "out"]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--opset", "7"), 2, "needs opset 18.*Pass --opset 18"),
        (("--to", "pt2", "--opset", "18"), 2, "--opset is a matter of ONNX files"),
        (("--to", "pt2", "--int8"), 2, "--int8 is a matter of ONNX files"),
        (("--max-drop", "1"), 2, "--max-drop needs a test set; pass --test"),
        (("--min-agreement", "2", "--test", "x"), 2, "min_agreement"),
        (("--tolerance", "0"), 2, "tolerance = 0 tolerates nothing"),
        (("--fixed-batch", "49"), 2, "needs 49 images .* there are 48"),
        (("--output", "nowhere/net.onnx"), 3, "there is no folder"),
        (("--data", "tensors:gone.npz"), 3, "gone.npz"),
    ],
)
def test_bad_requests_are_refused(
    made: Workbench, flags: tuple[str, ...], code: int, words: str
) -> None:
    said = paragraph(command(*exporting(made, *flags)), code)
    assert re.search(words, said), said
    assert made.leftovers() == ["out"]


def test_what_is_needed_is_asked_for(made: Workbench) -> None:
    result, output = str(made.output()), str(made.output("net.onnx"))
    assert "--data SPEC" in paragraph(command("export", result, "--output", output), 2)
    assert "--output FILE" in paragraph(command("export", result, "--data", made.train), 2)
    said = paragraph(command("export", result, "--data", made.train, "--output", output), 3)
    assert "--trust-code" in said
    assert "No checkpoint" in paragraph(
        command("export", "--data", made.train, "--output", output), 2
    )


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_package_that_is_missing_is_named_with_its_extra(
    made: Workbench, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = paragraph(command(*exporting(made)), 3)
    assert f"need the package {package}" in said
    assert "compress[onnx]" in said


def test_the_original_is_timed_beside_it(made: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"onnxruntime original": 4e-3, "torch original_channels_last": 5e-4}
    stop_the_clock(monkeypatch, **slow)
    done = command(*exporting(made, "--original", made.checkpoint, "--json"))
    assert done.exit_code == 0, done.stderr
    times = {(t["runtime"], t["batch_size"]): t for t in json.loads(done.stdout)["times"]}
    for batch in (1, 8):
        found = times["onnxruntime", batch]
        assert (found["seconds"], found["original"]) == (1e-3, 4e-3)
        assert times["torch", batch]["original"] == 5e-4  # in its better memory format
    shown = command(*exporting(made, "--original", made.checkpoint, "--force")).stdout
    assert "onnxruntime      1   4.00 ms   1.00 ms  \N{MULTIPLICATION SIGN}0.25" in shown


def test_the_original_must_be_that_of_the_result(made: Workbench) -> None:
    other = made.folder / "weights.pt"
    torch.save({"head.bias": torch.zeros(3)}, other)
    said = paragraph(command(*exporting(made, "--original", str(other))), 3)
    assert "Pass the original that was compressed" in said
    plain = (
        "export", made.checkpoint, "--model", SPEC, "--data", made.train,
        "--output", str(made.output("net.onnx")), "--original", made.checkpoint,
    )  # fmt: skip
    assert "leave it out" in paragraph(command(*plain), 2)


def test_one_image_is_enough(made: Workbench) -> None:
    images, labels = made_images(1)
    np.savez(made.folder / "one.npz", images=images, labels=labels)
    data = f"tensors:{made.folder / 'one.npz'}"
    done = command(*exporting(made, "--data", data, "--no-latency"))
    assert done.exit_code == 0, done.stderr
    assert "on 1 image;" in done.stdout


def test_eight_bits_are_chosen_measured_and_said(made: Workbench) -> None:
    asked = ("--int8", "--test", made.test, "--original", made.checkpoint)
    done = command(*exporting(made, *asked, "--json"))
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    proto = onnx.load(made.output("net.onnx"))
    stored = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(stored["compress"])["model"] == SPEC
    kept = json.loads(stored["compress.int8"])["float"]
    assert kept == list(said["int8"]["kept"])
    assert said["int8"]["layers"] == 5  # of the three, two are chains
    assert said["int8"]["kept_macs"] <= 0.1
    assert 0 < said["int8"]["distance"] <= said["int8"]["distance_of_all"]
    assert said["int8"]["images"] == [36, 12]
    quantised = {node.input[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    assert sum(name.endswith("weight_quantized") for name in quantised) == 5 - len(kept)
    runtimes = {each["runtime"] for each in said["times"]}
    assert {"torch", "onnxruntime", "onnxruntime, int8"} <= runtimes
    # Measured once more, by hand.
    session = onnxruntime.InferenceSession(str(made.output("net.onnx")))
    right = session.run(None, {"input": IMAGES.numpy()})[0].argmax(1) == made_images(24, seed=2)[1]
    assert said["test"]["top1_after"] == pytest.approx(right.mean())
    original = made.report()["result"]["test"]["top1_before"]
    assert said["beside_original"]["top1_before"] == pytest.approx(original)
    shown = command(*exporting(made, *asked, "--force", "--no-latency")).stdout
    assert re.search(r"layers in eight bits[.;]", shown)
    assert "of the original" in shown
    assert made.leftovers() == ["net.onnx", "out"]


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        (("--max-drop", "0.5"), "drop of the test set's measure is .*, and --max-drop is 0.5"),
        (("--min-agreement", "0.99"), "share of equal predictions is .* --min-agreement is 0.99"),
    ],
)
def test_limits_are_held_against_the_original(
    bench: Workbench, limit: tuple[str, ...], words: str
) -> None:
    # A file whose numbers are right, and whose network is worse than its original.
    assert bench.run("--rank", "conv2=1", "--rank", "conv1=1", "--no-refit").exit_code == 0
    asked = ("--test", bench.test, "--original", bench.checkpoint, "--no-latency")
    tested = bench.report()["result"]["test"]
    assert tested["agreement"] < 0.99
    assert tested["drop"] > 0.5
    assert re.search(words, paragraph(command(*exporting(bench, *asked, *limit)), 1))
    assert bench.leftovers() == ["out"]


def test_eight_bits_need_two_images(made: Workbench) -> None:
    images, labels = made_images(1)
    np.savez(made.folder / "one.npz", images=images, labels=labels)
    data = f"tensors:{made.folder / 'one.npz'}"
    assert "a batch of images to calibrate on and another" in paragraph(
        command(*exporting(made, "--data", data, "--int8")), 3
    )


def test_the_test_set_does_not_decide_about_eight_bits(made: Workbench) -> None:
    asked = [
        "export", str(made.output()), "--trust-code", "--test", made.test, "--int8",
        "--output", str(made.output("net.onnx")), "--no-latency",
    ]  # fmt: skip
    assert "pass --data SPEC" in paragraph(command(*asked), 2)
    same = command(*asked, "--data", made.test)
    assert same.exit_code == 0, same.stderr
    assert "say nothing about unseen ones" in " ".join(same.stdout.split())


def test_images_of_one_class_will_do(made: Workbench) -> None:
    images, labels = made_images(30)
    np.savez(made.folder / "same.npz", images=images, labels=0 * labels)
    data = f"tensors:{made.folder / 'same.npz'}"
    done = command(*exporting(made, "--data", data, "--int8", "--no-latency"))
    assert done.exit_code == 0, done.stderr


def test_a_fixed_batch_takes_whole_batches_of_all_sets(made: Workbench) -> None:
    asked = ("--fixed-batch", "7", "--int8", "--test", made.test, "--no-latency", "--json")
    done = command(*exporting(made, *asked))
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["warnings"] == ["3 test images fill no batch, and are left out."]
    assert (said["images"], said["test"]["images"], said["int8"]["images"]) == (42, 21, [35, 7])


def test_a_run_exports_its_result(bench: Workbench) -> None:
    done = bench.run(*RANKS, "--no-latency", "--export", "onnx")
    assert done.exit_code == 0, done.stderr
    assert "ONNX, opset 20" in done.stdout
    assert "in torch" in done.stdout
    assert "of the original" in done.stdout
    file = bench.output() / "model.onnx"
    session = onnxruntime.InferenceSession(str(file))
    model = compress.load(bench.output(), trust_code=True)
    (found,) = session.run(["output"], {"input": IMAGES.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(found), model(IMAGES))
    again = bench.run(*RANKS, "--no-latency", "--export", "pt2", "--force", "--json")
    assert again.exit_code == 0, again.stderr
    said = json.loads(again.stdout)
    assert said["kind"] == "run"
    assert said["exported"]["target"] == "pt2"
    assert (bench.output() / "model.pt2").exists()
    assert not file.exists()  # the folder is replaced as a whole


def test_a_result_stays_where_its_export_fails(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> OnnxModel:
        raise ModelError("torch's exporter cannot write the network as ONNX: it is Friday.")

    monkeypatch.setattr("compress.deploy.file.to_onnx", fail)
    done = bench.run(*RANKS, "--no-latency", "--export", "onnx")
    assert done.exit_code == 3
    assert "it is Friday" in done.stderr
    assert "layers rewritten" in done.stdout
    assert compress.load(bench.output(), trust_code=True)
    assert bench.leftovers() == ["out"]


def test_a_run_that_cannot_export_does_not_begin(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> None:
        raise ModelError("ONNX files need the package onnxscript, which is not installed.")

    monkeypatch.setattr("compress.deploy.engines.require", missing)
    done = bench.run(*RANKS, "--export", "onnx")
    assert "need the package onnxscript" in paragraph(done, 3)
    assert not bench.output().exists()


def test_a_result_in_half_precision_is_compared_with_its_original(bench: Workbench) -> None:
    state = load_file(bench.checkpoint)
    save_file({k: t.half() if t.is_floating_point() else t for k, t in state.items()},
              bench.checkpoint)  # fmt: skip
    assert bench.run(*RANKS, "--no-latency").exit_code == 0
    flags = ("--original", bench.checkpoint, "--test", bench.test, "--no-latency", "--json")
    done = command(*exporting(bench, *flags))
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["beside_original"]["images"] == 24


def test_eight_bits_of_a_regression_are_judged_by_its_values(made: Workbench) -> None:
    data = made.folder / "values.npz"
    images = made_images(48, seed=1)[0]
    np.savez(data, images=images, labels=np.random.default_rng(0).random((48, 3), np.float32))
    flags = ("--int8", "--no-latency", "--json", "--task", "regression")
    asked = exporting(made, *flags)
    asked[asked.index("--data") + 1] = f"tensors:{data}"
    done = command(*asked)
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["agreement"] is None
    plain = json.loads(command(*exporting(made, *flags[:3], name="other.onnx")).stdout)
    assert plain["agreement"] is not None


def test_pictures_of_several_sizes_are_no_defect(bench: Workbench, tmp_path: Path) -> None:
    code = tmp_path / "sized.py"
    code.write_text(
        "import torch\n\n\n"
        "def images():\n"
        "    return [(torch.rand(1, 8 + i % 2, 8), i % 3) for i in range(24)]\n"
    )
    data = f"{code}:images"
    sized = ("--batch-size", "1", "--no-latency")
    found = bench.run(*RANKS, *sized, "--no-refit", data=data, test=data)
    assert found.exit_code == 0, found.output
    asked = exporting(bench, *sized)
    asked[asked.index("--data") + 1] = data
    assert "invalid dimensions" in paragraph(command(*asked), 3)  # as a file has one size
