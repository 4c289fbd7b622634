"""Networks that do more than call their layers: through the command line, from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import awkward
from places import NETWORKS
from safetensors.torch import load_file, save_file
from torch import nn
from workbench import Workbench, command, made_images, paragraph

import compress
from compress.pipeline.job import _on_device

SOURCE = NETWORKS / "awkward.py"
RANKS = ("--rank", "*=3", "--force-rank")


def spec_of(bench: Workbench, name: str, dtype: torch.dtype = torch.float32) -> str:
    """Write a checkpoint of one of the networks; return its spec."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = getattr(awkward, name)().state_dict()
    save_file(
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()},
        bench.checkpoint,
    )
    return f"{SOURCE}:{name}"


# Network; layers that are kept although a rank is asked for, with words of the reason.
CASES: list[tuple[str, dict[str, str]]] = [
    (
        "ReadsAttributes",
        {
            "second": "does more with it than call it with one tensor ('Sequential' object has no "
            "attribute 'weight')",
            "head": "has no attribute 'in_features'",
        },
    ),
    ("WeightUsedTwice", {"second": "has no attribute 'weight'"}),
    ("OutputSize", {"second": "unexpected keyword argument 'output_size'"}),
    ("OutputSizeByPosition", {"second": "takes 2 positional arguments but 3 were given"}),
    ("AsksForTheType", {"second": "computes something else with a chain"}),
    ("PlainList", {"second": "from a plain list"}),
    ("KeepsActivations", {}),
    ("CountsInABuffer", {}),
    ("AlwaysDropsOut", {}),
    ("FoldsPixels", {}),
    ("HeadFirst", {}),
    ("TakesMore", {}),
    ("RepeatsByValues", {}),
    ("ByBatchSize", {"alone": "no calibration image reached it", "second": "never called"}),
    ("compiled", {}),
]


@pytest.mark.parametrize(("name", "kept"), CASES, ids=[n for n, _ in CASES])
def test_a_network_is_compressed_reloaded_and_measured(
    bench: Workbench, name: str, kept: dict[str, str]
) -> None:
    spec = spec_of(bench, name)
    before = Path(bench.checkpoint).read_bytes()
    result = bench.run(*RANKS, model=spec)
    assert result.exit_code == 0, result.stderr
    assert Path(bench.checkpoint).read_bytes() == before
    report = bench.report()["result"]
    layers = {x["name"]: x for x in report["layers"]}
    assert {n for n, x in layers.items() if x["scheme"] == "dense"} == set(kept)
    for layer, words in kept.items():
        assert words in layers[layer]["reason"]

    model = compress.load(bench.output(), trust_code=True)
    images, labels = made_images(24, seed=2)
    with torch.no_grad(), torch.random.fork_rng():
        assert torch.isfinite(model(torch.tensor(images).unsqueeze(1).float() / 255)).all()
    common = ("--test", bench.test, "--trust-code", "--json")
    found = command("evaluate", str(bench.output()), *common)
    assert found.exit_code == 0, found.stderr
    measured = json.loads(found.stdout)
    assert measured["top1"] == pytest.approx(report["test"]["top1_after"], abs=0.5 / len(labels))
    verified = command(
        "verify", str(bench.output() / "model.safetensors"), "--checkpoint", bench.checkpoint,
        *common,
    )  # fmt: skip
    assert verified.exit_code == 0, verified.stderr
    inspected = command("inspect", bench.checkpoint, "--model", spec, "--data", bench.train)
    assert inspected.exit_code == 0, inspected.stderr
    for layer, words in kept.items():
        assert any(
            line.startswith(f"Kept {layer}: ") and words in line
            for line in inspected.stdout.splitlines()
        )
    assert command("report", str(bench.output())).exit_code == 0


def test_equal_runs_of_a_network_that_counts_give_equal_bytes(bench: Workbench) -> None:
    spec = spec_of(bench, "CountsInABuffer")
    for name in ("first", "second"):
        assert bench.run(*RANKS, model=spec, output=str(bench.output(name))).exit_code == 0
    files = [bench.output(name) / "model.safetensors" for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert int(load_file(files[0])["calls"]) == 0


def test_a_users_model_is_left_as_it_was(bench: Workbench) -> None:
    del bench  # only its stopwatch is wanted
    model = awkward.KeepsActivations().eval()
    images = torch.tensor(made_images(24)[0]).unsqueeze(1).float() / 255
    compressed = compress.compress_model(model, images, rank={"second": "3"}, refit=True)
    assert isinstance(compressed.model.second, nn.Sequential)
    assert (model.last, model.seen, model.calls) == (None, [], 0)
    assert (compressed.model.last, compressed.model.seen, compressed.model.calls) == (None, [], 0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RaisesKeyError", ["forward failed", "KeyError: 'logit'"]),
        ("scripted", ["TorchScript module", "before torch.jit.script"]),
        ("scripted_inside", ["TorchScript modules (0)", "before torch.jit.script"]),
        ("lazy", ["wait for their first input (0)"]),
        ("without_parameters", ["has no parameters"]),
        ("holding_a_lock", ["cannot be copied", "lock"]),
        ("NanInTheMiddle", ["NaN or infinite outputs on the first image", "begin in 'second'"]),
    ],
)
def test_networks_that_cannot_be_compressed_say_why(
    bench: Workbench, name: str, words: list[str]
) -> None:
    spec = f"{SOURCE}:{name}"
    if name != "lazy":
        spec_of(bench, name)
    text = paragraph(bench.run(*RANKS, model=spec), 3)
    for word in words:
        assert word in text
    assert bench.leftovers() == []


@pytest.mark.parametrize("metric", ["loss", "mse"])
def test_nan_after_the_last_layer_is_found(bench: Workbench, metric: str) -> None:
    images, labels = made_images(48, seed=1)
    images[7:] = 255
    np.savez(bench.folder / "train.npz", images=images, labels=labels)
    spec = spec_of(bench, "NanAtTheEnd")
    flags = (*RANKS, "--metric", metric, "--seed", "2")
    assert "NaN or infinite" in paragraph(bench.run(*flags, model=spec), 3)
    assert bench.leftovers() == []


@pytest.mark.parametrize("name", ["Float32Inside", "Overflows"])
def test_half_precision_that_the_model_cannot_run_in(bench: Workbench, name: str) -> None:
    text = paragraph(bench.run(*RANKS, model=spec_of(bench, name, torch.float16)), 3)
    assert "float16" in text
    assert "convert the checkpoint to float32" in text
    assert bench.run(*RANKS, model=spec_of(bench, name)).exit_code == 0


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("failing", f"--metric-fn {SOURCE}:failing raised KeyError: 'accuracy' at awkward.py"),
        ("undefined", "--metric-fn gave nan"),
    ],
)
def test_a_metric_that_fails_says_so(bench: Workbench, metric: str, words: str) -> None:
    spec = spec_of(bench, "Plain")
    own = ("--metric-fn", f"{SOURCE}:{metric}")
    text = paragraph(bench.run(*RANKS, *own, model=spec), 3)
    assert words in text
    given = ("--model", spec, "--test", bench.test, *own)
    assert paragraph(command("evaluate", bench.checkpoint, *given), 3) == text


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("failing", f"--loss-fn {SOURCE}:failing raised KeyError: 'accuracy' at awkward.py"),
        ("undefined", "--loss-fn must return one number"),
        ("per_image", "it gave Tensor of shape (36,)"),
        ("detached", "gradients can be taken of"),
    ],
)
def test_a_loss_that_fails_says_so(bench: Workbench, loss: str, words: str) -> None:
    flags = (*RANKS, "--loss-fn", f"{SOURCE}:{loss}")
    assert words in paragraph(bench.run(*flags, model=spec_of(bench, "Plain")), 3)
    assert bench.leftovers() == []


def test_a_search_without_validation_images(bench: Workbench) -> None:
    text = paragraph(bench.run("--target-drop", "5", "--calibration-images", "1"), 3)
    assert "no validation images" in text


class Shifted(nn.Module):
    """Frames in the axis of images, some of whose channels are moved in time before each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(6)])
        self.last = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)])
        self.head = nn.Linear(8, 3)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        x = self.stem(clips.flatten(0, 1))
        for block in self.blocks:
            frames = x.view(x.size(0) // 4, 4, *x.shape[1:])
            moved = torch.cat([frames[:, 1:, :4], frames[:, :1, :4]], 1)
            x = x + block(torch.cat([moved, frames[:, :, 4:]], 2).flatten(0, 1)).relu()
        x = x.view(-1, 4, *x.shape[1:]).mean(1)  # an image each from here on
        for block in self.last:
            x = x + block(x).relu()
        return self.head(x.mean((2, 3)))


def test_frames_in_the_axis_of_images_are_refitted_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("compress.fit.stretches.STEP_POSITIONS", 200)
    monkeypatch.setattr("compress.fit.stretches.LEAST_IMAGES", 2)
    torch.manual_seed(0)
    clips = torch.randn(40, 4, 3, 6, 6)
    found = compress.compress_model(Shifted().eval(), clips, macs=0.6)
    assert found.result.cost.compressed.macs <= 0.6 * found.result.cost.folded.macs


def test_the_model_that_is_given_stays_where_it_is() -> None:
    model = nn.Linear(3, 2)
    assert _on_device(model, "cpu") is model
    assert _on_device(model, "meta").weight.is_meta
    assert model.weight.device.type == "cpu"


def test_labels_of_calibration_images_that_are_no_classes_are_passed_over(
    bench: Workbench,
) -> None:
    images, labels = made_images(48, seed=1)
    np.savez(bench.folder / "train.npz", images=images, labels=labels + 7)
    found = bench.run("--rank", "conv2=4")
    assert found.exit_code == 0, found.output
    validation = bench.report()["result"]["validation"]
    assert validation["top1_before"] is None
    assert validation["agreement"] is not None
    assert bench.report()["result"]["test"]["top1_before"] is not None


def test_a_file_of_statistics_may_hold_more_than_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 3)
    ).eval()
    images, file = torch.randn(60, 1, 8, 8), str(tmp_path / "statistics.safetensors")
    compress.compress_model(model, images, macs=0.6, calibration=file)
    found = compress.compress_model(model, images, energy=0.9, calibration=file)
    assert any(c.rewritten for c in found.plan.choices)


class Cached(nn.Module):
    """Fills a buffer in its first forward, and makes another."""

    ramp: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)
        self.register_buffer("ramp", None)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.ramp is None:
            self.ramp = torch.linspace(0.5, 1.5, images.shape[-1])
            self.register_buffer("halves", self.ramp / 2, persistent=False)
        x = self.second(self.first(images * self.ramp).relu()).relu() * self.halves
        return self.head(x.mean((2, 3)))


def test_buffers_that_a_forward_makes_are_no_part_of_a_result(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, out = torch.rand(40, 1, 8, 8), str(tmp_path / "out")
    found = compress.compress_model(Cached().eval(), images, macs=0.6, output=out)
    assert found.network.graph is not None
    assert "ramp" not in load_file(tmp_path / "out" / "model.safetensors")
    loaded = compress.load(out, model=Cached())
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), found.model(images))
