"""A network of convolutions in three dimensions: through the command line, from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from networks.video import clips, video
from places import NETWORKS
from stopwatch import stop_the_clock
from workbench import command

import compress
from compress.network.baseline import prepare
from compress.report import read_report

SOURCE = NETWORKS / "video.py"
DATA = ("--data", f"{SOURCE}:clips?count=24", "--test", f"{SOURCE}:clips?count=12&seed=1")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    stop_the_clock(monkeypatch)
    torch.save(video().state_dict(), tmp_path / "weights.pt")
    return str(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    "rule",
    [
        ("--rank", "*=4", "--rank", "up=3,5", "--rank", "grouped=2", "--force-rank"),
        ("--macs", "0.5", "--schemes", "output,input,two_sided,spatial"),
        ("--latency", "1", "--latency-batch", "2"),
    ],
    ids=["rank", "macs", "latency"],
)
def test_a_network_is_compressed_reloaded_and_verified(
    tmp_path: Path, checkpoint: str, rule: tuple[str, ...]
) -> None:
    out, spec = tmp_path / "out", f"{SOURCE}:video"
    result = command("run", checkpoint, "--model", spec, *DATA, *rule, "--output", str(out))
    assert result.exit_code == 0, result.stderr
    layers = {x["name"]: x for x in read_report(out)["result"]["layers"]}
    if rule[0] == "--rank":
        assert {n: x["scheme"] for n, x in layers.items()} == {
            "stem": "output", "down": "output", "up": "two_sided", "flat": "output",
            "grouped": "output", "head": "output",
        } | ({"head": "dense"} if layers["head"]["scheme"] == "dense" else {})  # fmt: skip
    model = compress.load(out, trust_code=True)
    before, after = (prepare(m, clips()[0][0][None]).macs for m in (video(), model))
    if rule[0] == "--macs":
        assert after <= 0.5 * before
    with torch.no_grad():
        assert torch.isfinite(model(torch.stack([clips()[k][0] for k in range(3)]))).all()
    verified = command(
        "verify", str(out), "--checkpoint", checkpoint, *DATA[2:], "--trust-code", "--json"
    )
    assert verified.exit_code == 0, verified.stderr
    again = json.loads(verified.stdout)["result"]["layers"]
    assert {x["name"]: x["full_rank"] for x in again} == {
        name: x["full_rank"] for name, x in layers.items()
    }


def test_norms_are_folded_and_factors_refitted_in_order_and_jointly() -> None:
    network = prepare(video(), clips()[0][0][None])
    assert [pair.layer for pair in network.folded] == ["stem"]
    assert network.graph is not None
    images = torch.stack([clips(24)[k][0] for k in range(24)])
    labels = torch.tensor(clips(24).targets)
    settings = {"spec": "", "rank": {"*": "3"}, "force_rank": True, "metric": "mse"}
    errors = []
    for refit in (False, True):
        made = compress.compress_model(video(), (images, labels), refit=refit, **settings)
        with torch.no_grad():
            errors.append(float((made.model(images) - video()(images)).square().mean()))
    assert errors[1] < 0.9 * errors[0]
