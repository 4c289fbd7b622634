"""Runtimes: what they compute is what torch does, and what is missing is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiling import compiling
from torch import nn
from torch._dynamo.utils import counters

from compress.config import RUNTIMES
from compress.deploy import engines
from compress.deploy.engines import Engine, engine_named
from compress.deploy.runtimes import installed
from compress.errors import ConfigError, ModelError
from compress.timing.networks import time_network_formats
from compress.timing.turns import Pace


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    return model.eval()


INPUTS = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=compiling) if n == "compile" else n for n in RUNTIMES]
)
def test_networks_and_layers_compute_what_torch_does(name: str) -> None:
    if name == "openvino" and not installed(name):
        pytest.skip("openvino is not installed")
    engine, model = engine_named(name), network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    several = engine.network(model, [INPUTS[:1], INPUTS])
    fixed = engine.network(model, [INPUTS[:2]])
    with torch.no_grad():
        for built, counts in ((several, (1, 6)), (fixed, (2,))):
            for count in counts:
                torch.testing.assert_close(built(INPUTS[:count]), model(INPUTS[:count]))
        layer = engine.layer(model[0], INPUTS)
        torch.testing.assert_close(layer(INPUTS), model[0](INPUTS), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert (engine.name, engine.described.split()[0]) == (name, name)


def test_weights_in_another_order_in_memory_are_exported_too() -> None:
    model = network()
    last = network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    built = engine_named("onnxruntime").network(last, [INPUTS])
    with torch.no_grad():
        torch.testing.assert_close(built(INPUTS), model(INPUTS))
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_what_is_only_timed_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checker takes seconds for a large network, and a search builds one after the other."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("checked")

    monkeypatch.setattr("onnx.checker.check_model", refused)
    assert engine_named("onnxruntime").network(network(), [INPUTS]) is not None


@compiling
def test_nothing_is_compiled_while_it_is_timed() -> None:
    engine = engine_named("compile")
    models = {str(i): engine.network(network(), [INPUTS[:1], INPUTS]) for i in range(2)}
    before = counters["stats"]["unique_graphs"]
    assert before >= 4
    for count in (1, 6):
        time_network_formats(models, INPUTS[:count], ("contiguous",), Pace(1, 0.0))
    assert counters["stats"]["unique_graphs"] == before


def test_a_network_that_cannot_be_compiled_is_said() -> None:
    class Failing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(f"not for {len(x)} images")

    with pytest.raises(ModelError, match=r"torch\.compile cannot .*not for 6 images.*--runtime"):
        engine_named("compile").network(Failing(), [INPUTS])


def test_only_torch_runs_elsewhere_than_on_the_cpu() -> None:
    assert engine_named("torch", "cuda") == Engine()
    with pytest.raises(ConfigError, match="--runtime onnxruntime is timed on the CPU alone"):
        engine_named("onnxruntime", "cuda")


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.deploy.compiled.shutil.which", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler, and none is found"):
        engine_named("compile")


@pytest.mark.parametrize(("name", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_a_missing_package_is_said_with_its_extra(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(package: str, extra: str, user: str) -> Any:
        raise ModelError(f"{user}: {package}, {extra}")

    monkeypatch.setattr(engines, "require", missing)
    with pytest.raises(ModelError, match=f"Times on {name}: {name}, {extra}"):
        engine_named(name)
