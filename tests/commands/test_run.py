"""The main job through the command line, on a tiny trained network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import body_of, flipped
from places import NETWORKS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stopwatch import stop_the_clock
from workbench import SPEC, Workbench, command, made_images, paragraph, trained

import compress
from compress.config import make_config, read_toml

NETWORK = trained()
RANKS = ("--rank", "conv1=3", "--rank", "conv2=4")


def test_a_run_leaves_a_whole_result(bench: Workbench) -> None:
    result = bench.run(*RANKS, "--max-drop", "50")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    files = {"model.safetensors", "report.json", "report.md", "report.html", "plan.json"}
    assert {p.name for p in bench.output().iterdir()} == {*files, "config.toml", "runtime.json"}
    assert bench.leftovers() == ["out"]
    layers = {x["name"]: x for x in bench.report()["result"]["layers"]}
    assert [layers[n]["ranks"] for n in ("conv1", "conv2", "head")] == [[3], [4], []]
    for name in ("conv1", "conv2"):
        assert layers[name]["errors"]["validation_alone"]["relative_mse"] > 0
        assert f"{name}  " in result.stdout
    for words in (
        "3 of 8",
        "4 of 12",
        "Kept head: no rank given",
        "MACs",
        "parameters",
        "95% interval",
        "Limit kept: drop",
        f"Result: {bench.output()}",
    ):
        assert words in result.stdout  # fmt: skip


def test_the_result_loads_as_plain_layers_with_the_reported_accuracy(bench: Workbench) -> None:
    assert bench.run(*RANKS).exit_code == 0
    model = compress.load(bench.output(), trust_code=True)
    kinds = {type(m).__module__.partition(".")[0] for m in model.modules()} - {"_compress_user_"}
    assert {k for k in kinds if not k.startswith("_compress_user")} == {"torch"}
    images, labels = made_images(24, seed=2)
    with torch.no_grad():
        found = model(torch.tensor(images).unsqueeze(1).float() / 255).argmax(1)
    right = float((found == torch.tensor(labels)).double().mean())
    assert bench.report()["result"]["test"]["top1_after"] == pytest.approx(right)
    assert right > 0.4


def test_equal_runs_give_equal_bytes(bench: Workbench) -> None:
    first = bench.run("--energy", "0.95", output=str(bench.output("first")))
    assert first.exit_code == 0, first.stderr
    other = bench.run(
        "--batch-size", "5", "--config", str(bench.output("first") / "config.toml"),
        output=str(bench.output("second")),
    )  # fmt: skip
    assert other.exit_code == 0, other.stderr
    again = bench.run("--energy", "0.95", output=str(bench.output("third")))
    assert again.exit_code == 0, again.stderr
    files = [bench.output(n) / "model.safetensors" for n in ("first", "third")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # Other batches are other orders of addition: the same function to rounding.
    inputs = torch.tensor(made_images(24, seed=2)[0]).unsqueeze(1).float() / 255
    loaded = [compress.load(bench.output(n), trust_code=True) for n in ("first", "second")]
    with torch.no_grad():
        torch.testing.assert_close(loaded[1](inputs), loaded[0](inputs), atol=1e-2, rtol=1e-2)


def test_the_configuration_beside_the_result_repeats_it(bench: Workbench) -> None:
    assert bench.run("--energy", "0.9", "--keep", "head", "--seed", "5").exit_code == 0
    config = make_config(read_toml(bench.output() / "config.toml"))
    assert (config.rules["energy"], config.keep, config.seed) == (0.9, ("head",), 5)
    assert (config.checkpoint, config.model) == (bench.checkpoint, SPEC)
    given = ("--config", str(bench.output() / "config.toml"), "--trust-code")
    result = command("run", *given, "--force", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["result"]["config"]["seed"] == 5


def test_a_run_can_measure_the_network_after_each_further_layer(bench: Workbench) -> None:
    result = bench.run(*RANKS, "--progressive")
    assert result.exit_code == 0, result.stderr
    found = bench.report()["result"]
    curve = found["progressive"]
    assert [point["layer"] for point in curve["points"]] == ["", "conv1", "conv2"]
    test = found["test"]
    ends = [curve["points"][i]["value"] for i in (0, -1)]
    assert ends == pytest.approx([test["top1_before"], test["top1_after"]])
    assert "Replacing layer by layer takes accuracy from" in result.stdout
    assert "plot-progressive" in (bench.output() / "report.html").read_text()
    weights = (bench.output() / "model.safetensors").read_bytes()
    assert bench.run(*RANKS, output=str(bench.output("without"))).exit_code == 0
    assert bench.report("without")["result"]["progressive"] is None
    assert (bench.output("without") / "model.safetensors").read_bytes() == weights


def test_json_is_the_report_and_quiet_is_silence(bench: Workbench) -> None:
    result = bench.run(*RANKS, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == bench.report()
    assert result.stderr == ""
    quiet = bench.run(*RANKS, "--quiet", "--force")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_a_failed_gate_keeps_the_report_and_saves_no_model(bench: Workbench) -> None:
    ranks = ("--rank", "conv1=1", "--rank", "conv2=1")
    result = bench.run(*ranks, "--max-layer-relative-mse", "1e-9", "--json")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "No model was saved" in result.stderr
    report = json.loads(result.stdout)
    assert report["verdict"] == "failed"
    assert [g["name"] for g in report["gates"] if not g["passed"]] == ["max_layer_relative_mse"]
    assert not (bench.output() / "model.safetensors").exists()
    assert (bench.output() / "report.html").exists()
    # Only a failed run's report lies there: no --force is needed.
    assert bench.run(*RANKS).exit_code == 0
    assert (bench.output() / "model.safetensors").exists()


def test_without_a_test_set_the_result_says_so(bench: Workbench) -> None:
    result = bench.run(*RANKS, test=None)
    assert result.exit_code == 0
    assert "Unverified" in result.stdout
    assert bench.report()["verdict"] == "unverified"
    with safe_open(bench.output() / "model.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["compress"])["verified"] == {}


def test_a_limit_on_the_test_set_takes_one(bench: Workbench) -> None:
    text = paragraph(bench.run(*RANKS, "--max-drop", "100", test=None), 2)
    assert "--max-drop holds the result to a test set: pass one with --test" in text
    assert bench.leftovers() == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_saved_in_its_own_type(bench: Workbench, dtype: torch.dtype) -> None:
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in NETWORK.state_dict().items()}
    save_file(half, bench.checkpoint)
    assert bench.run(*RANKS).exit_code == 0
    state = load_file(bench.output() / "model.safetensors")
    assert {v.dtype for v in state.values()} == {dtype}
    model = compress.load(bench.output(), trust_code=True)
    assert next(model.parameters()).dtype == dtype
    assert bench.report()["result"]["dtype"] == str(dtype).removeprefix("torch.")
    result = command("evaluate", str(bench.output()), "--test", bench.test, "--trust-code")
    assert result.exit_code == 0, result.stderr


def test_networks_that_are_no_classifiers_take_a_metric_and_a_loss(bench: Workbench) -> None:
    folder = NETWORKS
    spec = f"{folder / 'tiny.py'}:sequence"
    from networks.tiny import sequence

    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_file(sequence().state_dict(), bench.checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        # What the test set needs is asked for before any work.
        patch.setattr("compress.calibrate.collect.run_model", lambda *_: pytest.fail("too late"))
        for weighed in ((), ("--metric", "mse")):
            text = paragraph(bench.run("--energy", "0.9", *weighed, model=spec), 3)
            assert "--metric-fn" in text
    # Without a test set, all elements of the output count alike.
    assert bench.run("--energy", "0.9", "--force", model=spec, test=None).exit_code == 0
    shutil.rmtree(bench.output())
    result = bench.run(
        "--energy", "0.9", "--metric-fn", f"{folder / 'tiny.py'}:closeness",
        "--loss-fn", f"{folder / 'tiny.py'}:squared", model=spec,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "closeness" in result.stdout
    custom = bench.report()["result"]["test"]["custom"]
    assert custom["before"] < 0
    assert custom["after"] < 0


def test_a_plan_is_written_edited_and_applied(bench: Workbench) -> None:
    file = bench.folder / "plan.json"
    common = ("--model", SPEC, "--data", bench.train)
    result = command("plan", bench.checkpoint, *common, "--energy", "0.9", "--output", str(file))
    assert result.exit_code == 0, result.stderr
    assert f"Plan: {file}" in result.stdout
    assert bench.leftovers() == ["plan.json"]
    plan = json.loads(file.read_text())
    assert [c["name"] for c in plan["choices"]] == ["conv1", "conv2", "head"]
    assert "exists; pass --force" in paragraph(
        command("plan", bench.checkpoint, *common, "--output", str(file)), 3
    )
    for choice in plan["choices"]:
        choice.update(scheme="dense", ranks=[])
    plan["choices"][1].update(scheme="output", ranks=[2])
    file.write_text(json.dumps(plan))
    given = ("--checkpoint", bench.checkpoint, "--data", bench.train, "--test", bench.test)
    out = ("--output", str(bench.output()))
    text = paragraph(command("apply", str(file), *given, *out), 2)
    assert "--trust-code" in text
    result = command("apply", str(file), *given, *out, "--trust-code")
    assert result.exit_code == 0, result.stderr
    layers = bench.report()["result"]["layers"]
    assert [(x["scheme"], x["ranks"]) for x in layers] == [
        ("dense", []), ("output", [2]), ("dense", []),
    ]  # fmt: skip
    model = compress.load(bench.output(), trust_code=True)
    assert model.conv2[0].out_channels == 2


@pytest.mark.parametrize("task", [(), ("--task", "classification")])
@pytest.mark.parametrize("rule", [("--macs", "0.6"), ("--target-drop", "20")])
def test_plan_and_apply_share_a_calibration(
    bench: Workbench,
    monkeypatch: pytest.MonkeyPatch,
    rule: tuple[str, str],
    task: tuple[str, ...],
) -> None:
    file, plan = str(bench.folder / "cal.safetensors"), str(bench.folder / "plan.json")
    common = ("--model", SPEC, "--data", bench.train, "--calibration", file, *task)
    result = command("plan", bench.checkpoint, *common, *rule, "--output", plan)
    assert result.exit_code == 0, result.stderr

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr("compress.pipeline.job.calibrate", forbidden)
    given = (*common, "--checkpoint", bench.checkpoint, "--test", bench.test)
    result = command("apply", plan, *given, "--output", str(bench.output("applied")))
    assert result.exit_code == 0, result.stderr
    assert bench.run(*rule, *task, "--calibration", file).exit_code == 0
    files = [bench.output(name) / "model.safetensors" for name in ("applied", "out")]
    first, second = (load_file(f) for f in files)
    assert first.keys() == second.keys()
    assert all(torch.equal(second[k], v) for k, v in first.items())


def test_the_clock_has_no_say_in_what_is_saved(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever memory format was faster, and wherever the user's own code lies."""
    plan, models = str(bench.folder / "plan.json"), []
    given = ("--model", SPEC, "--data", bench.train, "--test", bench.test)
    rule = ("--macs", "0.6")
    chosen = command("plan", bench.checkpoint, *given[:4], *rule, "--output", plan)
    assert chosen.exit_code == 0, chosen.stderr
    for name, last in (("first", 0.02), ("second", 0.002)):
        stop_the_clock(monkeypatch, compressed=0.01, compressed_channels_last=last)
        folder = bench.output(name)
        folder.mkdir()
        shutil.copy(NETWORKS / "tiny.py", folder / "own.py")
        metric = ("--loss-fn", f"{folder / 'own.py'}:squared")
        given_apply = (*given, "--checkpoint", bench.checkpoint)
        for words in (
            ("run", bench.checkpoint, *given, *rule, *metric, "--output", str(folder / "run")),
            ("apply", plan, *given_apply, *metric, "--output", str(folder / "apply")),
            (
                "sweep", bench.checkpoint, *given, "--macs", "0.6,0.8", "--pick", "drop<=100",
                *metric, "--output", str(folder / "sweep"),
            ),
        ):  # fmt: skip
            done = command(*words)
            assert done.exit_code == 0, done.stderr
        results = [folder / "run", folder / "apply", folder / "sweep" / "chosen"]
        models.append([(result / "model.safetensors").read_bytes() for result in results])
        wanted = "channels_last" if last < 0.01 else "contiguous"
        for result in results:
            report = json.loads((result / "report.json").read_text())
            assert report["result"]["cost"]["memory_format"] == wanted
            runtime = json.loads((result / "runtime.json").read_text())
            assert runtime == {"format": 1, "memory_format": wanted}
    assert models[0] == models[1]


def test_a_damaged_runtime_file_is_told_and_costs_only_speed(bench: Workbench) -> None:
    assert bench.run(*RANKS).exit_code == 0
    (bench.output() / "runtime.json").write_text("{")
    test = ("--test", bench.test, "--trust-code")
    for words in (("verify", "--checkpoint", bench.checkpoint), ("evaluate",)):
        done = command(words[0], str(bench.output()), *words[1:], *test)
        assert done.exit_code == 0, done.stderr
        assert "runtime.json cannot be used" in done.stdout


def test_a_damaged_result_is_refused_by_every_command(bench: Workbench) -> None:
    assert bench.run(*RANKS).exit_code == 0
    file, test = bench.output() / "model.safetensors", ("--test", bench.test, "--trust-code")
    for _ in flipped(file, 2, body_of(file)):
        for words in (
            ("verify", str(bench.output()), "--checkpoint", bench.checkpoint, *test),
            ("evaluate", str(bench.output()), *test),
            ("report", "--before", bench.checkpoint, "--after", str(bench.output()), *test),
        ):
            text = paragraph(command(*words), 3)
            assert f"{file} was damaged or edited since it was written" in text


def test_a_plan_without_a_file_is_only_shown(bench: Workbench) -> None:
    common = (bench.checkpoint, "--model", SPEC, "--data", bench.train)
    result = command("plan", *common)
    assert result.exit_code == 0
    assert "Not written; pass --output" in result.stdout
    assert json.loads(command("plan", *common, "--json").stdout)["format"] == 1
    assert bench.leftovers() == []


def test_a_plan_for_another_checkpoint_or_model_is_refused(bench: Workbench) -> None:
    file = bench.folder / "plan.json"
    common = ("--model", SPEC, "--data", bench.train)
    assert command("plan", bench.checkpoint, *common, "--output", str(file)).exit_code == 0
    other = bench.folder / "other.safetensors"
    save_file(trained(1).state_dict(), other)
    out = ("--output", str(bench.output()))
    text = paragraph(command("apply", str(file), "--checkpoint", str(other), *common, *out), 2)
    assert "The plan was made for the checkpoint with SHA-256" in text
    plan = json.loads(file.read_text())
    plan["choices"][0].update(name="conv9")
    plan["choices"][1].update(scheme="output", ranks=[99])
    file.write_text(json.dumps(plan))
    given = ("--checkpoint", bench.checkpoint, *common, *out)
    text = paragraph(command("apply", str(file), *given), 2)
    assert "no layer 'conv9'" in text
    assert "ranks [99] are outside" in text
    assert "'conv1' is missing" in text
    file.write_text("{")
    assert "not valid JSON" in paragraph(command("apply", str(file), *given), 2)
    assert "cannot be read" in paragraph(command("apply", "no.json", *given), 2)
    assert bench.leftovers() == ["other.safetensors", "plan.json"]


def test_a_calibration_is_written_once_and_reused(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ("--calibration", str(bench.folder / "cal.safetensors"))
    assert bench.run("--energy", "0.9", *file).exit_code == 0
    first = (bench.output() / "model.safetensors").read_bytes()

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr("compress.pipeline.job.calibrate", forbidden)
    again = bench.run("--energy", "0.9", *file, "--force")
    assert again.exit_code == 0
    assert (bench.output() / "model.safetensors").read_bytes() == first
    text = paragraph(bench.run("--energy", "0.9", *file, "--seed", "1", "--force"), 3)
    assert "was made with other data" in text
    text = paragraph(bench.run("--energy", "0.9", *file, "--metric", "mse", "--force"), 3)
    assert "metric: loss there, mse here" in text


def test_inspect_lists_layers_with_and_without_data(bench: Workbench) -> None:
    result = command("inspect", bench.checkpoint, "--model", SPEC, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    layers = {x["name"]: x for x in found["layers"]}
    # conv1 1→8 3x3 on 8x8, rank r costs r(9 + 8) of 72 MACs a position, so 4 is the last to save.
    assert layers["conv1"]["macs"] == 64 * 72
    assert layers["conv1"]["break_even"] == 4
    assert layers["conv2"]["macs"] == 36 * 864
    assert layers["head"]["params"] == 39
    assert found["norms"] == ["norm"]
    assert found["original"]["params"] - found["folded"]["params"] == 8
    assert all(not x["eigenvalues"] for x in found["layers"])
    result = command("inspect", bench.checkpoint, "--model", SPEC, "--data", bench.train, "--json")
    layers = {x["name"]: x for x in json.loads(result.stdout)["layers"]}
    spectrum = np.array(layers["conv2"]["eigenvalues"])
    assert len(spectrum) == 12
    assert (np.diff(spectrum) <= 0).all()
    expected = int((spectrum >= 1e-2 * spectrum[0]).sum())
    assert layers["conv2"]["ranks"]["threshold 0.01"] == expected
    share = np.cumsum(spectrum) / spectrum.sum()
    assert layers["conv2"]["ranks"]["energy 0.99"] == int((share < 0.99).sum()) + 1
    text = command("inspect", bench.checkpoint, "--model", SPEC, "--data", bench.train).stdout
    assert "energy 0.9999" in text
    assert "Spectra of the outputs from 36 images." in text


def test_inspect_lists_what_can_become_narrower_together(bench: Workbench) -> None:
    result = command("inspect", bench.checkpoint, "--model", SPEC, "--json")
    found = json.loads(result.stdout)
    groups = {group["name"]: group for group in found["groups"]}
    assert groups["conv1"] == {
        "name": "conv1", "size": 8, "made_by": ["conv1"], "changed_by": [], "read_by": ["conv2"],
        "way": "narrow", "reason": None,
    }  # fmt: skip
    assert groups["conv2"]["read_by"] == ["head"]
    assert found["left"] == {"head": "they are an output of the network"}
    text = command("inspect", bench.checkpoint, "--model", SPEC).stdout
    row = next(line for line in text.splitlines() if line.split()[:2] == ["conv1", "conv1"])
    assert row.split()[-3:] == ["conv2", "narrow", "8"]
    assert "No channels taken out of head: they are an output of the network" in text


def test_inspect_needs_a_shape_from_somewhere(bench: Workbench) -> None:
    spec = f"{Path(SPEC.rpartition(':')[0])}:sequence"
    from networks.tiny import sequence

    save_file(sequence().state_dict(), bench.checkpoint)
    text = paragraph(command("inspect", bench.checkpoint, "--model", spec), 2)
    assert "--input-shape" in text
    result = command("inspect", bench.checkpoint, "--model", spec, "--input-shape", "1,8,8")
    assert result.exit_code == 0
    assert "one input of 1x8x8" in result.stdout


def test_evaluate_measures_originals_and_results(bench: Workbench) -> None:
    original = command(
        "evaluate", bench.checkpoint, "--model", SPEC, "--test", bench.test, "--json"
    )
    assert original.exit_code == 0, original.stderr
    found = json.loads(original.stdout)
    images, labels = made_images(24, seed=2)
    with torch.no_grad():
        logits = NETWORK(torch.tensor(images).unsqueeze(1).float() / 255)
    right = float((logits.argmax(1) == torch.tensor(labels)).double().mean())
    assert found["top1"] == pytest.approx(right)
    assert (found["top5"], found["compressed"], found["images"]) == (None, False, 24)
    assert found["cost"]["params"] == sum(p.numel() for p in NETWORK.parameters())
    assert bench.run(*RANKS).exit_code == 0
    refused = command("evaluate", str(bench.output()), "--test", bench.test)
    assert "--trust-code" in paragraph(refused, 3)
    for given in (("--trust-code",), ("--model", SPEC)):
        result = command("evaluate", str(bench.output()), "--test", bench.test, "--json", *given)
        assert result.exit_code == 0, result.stderr
        after = json.loads(result.stdout)
        assert after["compressed"]
        assert after["top1"] == bench.report()["result"]["test"]["top1_after"]
        assert after["cost"] == bench.report()["result"]["cost"]["compressed"]
    table = command("evaluate", bench.checkpoint, "--model", SPEC, "--test", bench.test).stdout
    assert "top-1 accuracy" in table
    assert "No images given" in paragraph(command("evaluate", bench.checkpoint), 2)


def test_verify_holds_a_result_to_its_gates_again(bench: Workbench) -> None:
    assert bench.run(*RANKS, "--max-drop", "60").exit_code == 0
    before = bench.report()["result"]
    given = ("verify", str(bench.output()), "--checkpoint", bench.checkpoint)
    result = command(*given, "--test", bench.test, "--trust-code", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["result"]["test"]["top1_after"] == before["test"]["top1_after"]
    assert report["result"]["cost"]["compressed"] == before["cost"]["compressed"]
    assert [(g["name"], g["limit"]) for g in report["gates"]] == [("max_drop", 60.0)]
    assert report["result"]["warnings"] == []
    images, labels = made_images(30, seed=11)
    np.savez(bench.folder / "other.npz", images=images, labels=labels)
    other = f"tensors:{bench.folder / 'other.npz'}"
    result = command(*given, "--test", other, "--model", SPEC, "--max-layer-relative-mse", "1e-9")
    assert result.exit_code == 1
    assert "These are other test images" in result.stdout
    assert result.stderr.startswith("Error: ")
    assert "--trust-code" in paragraph(command(*given, "--test", other), 3)
    assert "No test given" in paragraph(command(*given, "--model", SPEC), 2)
    save_file(trained(1).state_dict(), bench.checkpoint)
    text = paragraph(command(*given, "--test", other, "--model", SPEC), 3)
    assert "made from the checkpoint with SHA-256" in text


def test_ranks_beyond_break_even_need_force(bench: Workbench) -> None:
    kept = bench.run("--rank", "conv1=7", output=str(bench.output("kept")))
    assert kept.exit_code == 0
    assert "beyond break-even (4): rewriting would save nothing" in kept.stdout
    forced = bench.run("--rank", "conv1=7", "--force-rank")
    assert forced.exit_code == 0
    cost = bench.report()["result"]["cost"]
    # Per position 7(9 + 8) for 72 MACs; parameters 7(9 + 8) + 8 for 72 + 8.
    assert cost["compressed"]["macs"] - cost["folded"]["macs"] == 64 * (7 * 17 - 72)
    assert cost["compressed"]["params"] - cost["folded"]["params"] == 7 * 17 - 72


@pytest.mark.parametrize("flags", [["--macs", "0.6"], ["--params", "0.6"]])
def test_budgets_are_kept(bench: Workbench, flags: list[str]) -> None:
    result = bench.run(*flags)
    assert result.exit_code == 0, result.stderr
    assert bench.report()["headline"][f"{flags[0][2:]}_ratio"] <= 0.6 + 0.1 * (flags[0] != "--macs")


def test_an_unreachable_budget_names_the_smallest(bench: Workbench) -> None:
    text = paragraph(bench.run("--macs", "0.001"), 2)
    assert "smallest reachable fraction is" in text
    assert bench.leftovers() == []


def test_the_demo_runs_from_an_empty_folder(
    tmp_path: Path, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process, as a new user meets it; another run would replace its own result.

    Half the images and no stopwatch: the stages are the same, and take half the time.
    """
    del bench  # only its stopwatch is wanted
    place = tmp_path / "empty"
    place.mkdir()
    quick = tmp_path / "quick.toml"
    quick.write_text("calibration_images = 500\nno_latency = true\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "compress.commands", "demo", "--config", str(quick)],
        cwd=place, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Result: demo-result" in done.stdout
    assert [p.name for p in place.iterdir()] == ["demo-result"]
    report = json.loads((place / "demo-result" / "report.json").read_text())
    assert report["verdict"] == "passed"
    assert report["headline"]["macs_ratio"] < 0.5
    assert report["headline"]["params_ratio"] < 0.55
    assert report["headline"]["before"] - report["headline"]["after"] < 0.01
    model = compress.load(place / "demo-result")  # the embedded network needs no trust
    assert sum(p.numel() for p in model.parameters()) < 0.55 * 205_802
    monkeypatch.chdir(place)
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.commands.demo.run_and_show", lambda *given: asked.extend(given))
        assert command("demo", "--quiet").exit_code == 0
    assert (asked[0].output, asked[0].force) == ("demo-result", True)  # its own is replaced
    assert "already holds a result" in paragraph(command("demo", "--output", "demo-result"), 3)


def test_without_timing_nothing_says_a_time_and_no_limit_on_it_is_kept(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something was timed")

    monkeypatch.setattr("compress.measure.speed.time_network_formats", never)
    monkeypatch.setattr("compress.pipeline.evaluate.time_network", never)
    made = bench.run("--rank", "conv2=4", "--no-latency")
    assert made.exit_code == 0, made.stderr
    assert "Times were not measured (--no-latency)." in made.stdout
    assert "time, batch" not in made.stdout
    result = bench.report()["result"]
    assert result["cost"]["latency"] == []
    assert result["config"]["no_latency"] is True
    for name in ("report.md", "report.html"):
        assert "Times were not measured" in (bench.output() / name).read_text()
    runtime = json.loads((bench.output() / "runtime.json").read_text())
    assert runtime["memory_format"] == "contiguous"
    common = ("--test", bench.test, "--trust-code", "--no-latency")
    assert command("evaluate", str(bench.output()), *common).exit_code == 0
    saved = str(bench.output() / "model.safetensors")
    assert command("verify", saved, "--checkpoint", bench.checkpoint, *common).exit_code == 0
    broken = command("report", str(bench.output()), "--max-latency-ratio", "2")
    assert broken.exit_code == 1
    assert "latency was not measured, as --no-latency asks" in broken.stderr


def test_a_time_that_is_not_measured_can_be_no_budget_and_no_limit(bench: Workbench) -> None:
    text = paragraph(bench.run("--latency", "0.5", "--no-latency"), 2)
    assert "no_latency and latency contradict each other" in text
    limit = command("report", str(bench.folder), "--max-latency-ratio", "1", "--no-latency")
    assert "no_latency and max_latency_ratio contradict" in paragraph(limit, 2)
    assert bench.leftovers() == []
