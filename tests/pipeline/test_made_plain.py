"""Networks with layers of their own: through the command line, from end to end."""

from __future__ import annotations

import json

import pytest
import torch
from networks import special
from places import NETWORKS
from safetensors.torch import save_file
from workbench import Workbench, command, made_images

import compress

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


@pytest.mark.parametrize("name", ["special", "parametrised"])
def test_a_network_is_compressed_reloaded_and_verified(bench: Workbench, name: str) -> None:
    spec = f"{NETWORKS / 'special.py'}:{name}"
    original = getattr(special, name)()
    state = {key: value.contiguous() for key, value in original.state_dict().items()}
    save_file(state, bench.checkpoint)
    result = bench.run("--rank", "*=3", "--force-rank", model=spec)
    assert result.exit_code == 0, result.stderr
    layers = bench.report()["result"]["layers"]
    kept = {x["name"]: x["reason"] for x in layers if x["scheme"] == "dense"}
    assert not kept
    model = compress.load(bench.output(), trust_code=True)
    assert all(type(m).__module__.startswith("torch.nn") for n, m in model.named_modules() if n)
    images, _ = made_images(24, seed=2)
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor(images).unsqueeze(1).float() / 255)).all()
    found = command(
        "verify", str(bench.output()), "--checkpoint", bench.checkpoint, "--test", bench.test,
        "--trust-code", "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)
    inspected = command("inspect", bench.checkpoint, "--model", spec)
    assert inspected.exit_code == 0, inspected.stderr
    wanted = {"special": "6 subclasses made plain.", "parametrised": "6 modules with computed"}
    assert wanted[name] in inspected.stdout
