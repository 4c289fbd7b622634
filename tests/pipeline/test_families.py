"""torchvision's classification models by name, with random weights, from end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stopwatch import stop_the_clock
from workbench import command

import compress
from compress.inputs.models import build_model
from compress.report import read_report

# Spec, side of the images, how many layers at least are rewritten, further flags.
FAMILIES = [
    ("torchvision:resnet18?num_classes=10", 32, 12, ("--no-refit", "--keep", "layer4*")),
    ("torchvision:mobilenet_v3_small?num_classes=10", 32, 15, ("--no-refit",)),
    (
        "torchvision:googlenet?num_classes=10&aux_logits=true",
        64, 30, ("--no-refit", "--keep", "inception5*"),
    ),
    (
        "torchvision.models.vision_transformer:VisionTransformer?num_classes=10&image_size=32"
        "&patch_size=8&num_layers=2&num_heads=4&hidden_dim=64&mlp_dim=96",
        32, 6, (),
    ),
    (
        "torchvision.models.swin_transformer:SwinTransformer?num_classes=10&patch_size=[4,4]"
        "&embed_dim=24&depths=[1,2]&num_heads=[2,2]&window_size=[4,4]",
        32, 8, (),
    ),
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_the_clock(monkeypatch)


@pytest.mark.parametrize(
    ("spec", "side", "least", "flags"),
    FAMILIES,
    ids=[f[0].partition("?")[0].rpartition(":")[2] for f in FAMILIES],
)
def test_a_family_runs_through(
    tmp_path: Path, spec: str, side: int, least: int, flags: tuple[str, ...]
) -> None:
    torch.save(build_model(spec).module.state_dict(), tmp_path / "weights.pt")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (6, side, side, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(6))
    data = f"tensors:{tmp_path / 'images.npz'}"
    result = command(
        "run", str(tmp_path / "weights.pt"), "--model", spec, "--data", f"{data}?stop=4",
        "--test", f"{data}?start=4", "--resize", str(side), "--crop", str(side),
        "--batch-size", "2", "--energy", "0.6", "--metric", "mse", "--schemes", "output",
        "--latency-batch", "1", "--output", str(tmp_path / "out"), *flags,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = read_report(tmp_path / "out")
    assert report["headline"]["rewritten"] >= least
    assert all(x["reason"] for x in report["result"]["layers"])
    model = compress.load(tmp_path / "out", trust_code=not spec.startswith("torchvision:"))
    with torch.no_grad():
        assert torch.isfinite(model(torch.rand(2, 3, side, side))).all()
    own = {type(m).__module__ for m in model.modules() if "compress" in type(m).__module__}
    assert all(name.startswith("compress.modules.attention") for name in own)
