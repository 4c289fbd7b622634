"""Results on several runtimes: what is timed, in which order, and what becomes of refusals."""

from __future__ import annotations

import pytest
import torch
from stopwatch import stop_the_clock
from torch import Tensor, nn

from compress.deploy.engines import Engine, engine_named, exported
from compress.deploy.runtimes import SESSIONS
from compress.errors import ModelError
from compress.measure.runtimes import on_runtimes
from compress.timing.runtimes import time_runtimes

EXAMPLE = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
MILLISECOND = 1e-3


class Viewing(nn.Module):
    """Its forward takes contiguous activations alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.linear(x.view(x.shape[0], -1))


@pytest.fixture
def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"dense": Viewing().eval(), "compressed": Viewing().eval()}


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: bytes) -> None:
        raise ModelError("OpenVINO does not take the network: it is too new.")

    monkeypatch.setattr("compress.deploy.file.installed", lambda _: True)
    monkeypatch.setitem(SESSIONS, "openvino", refuse)


@pytest.mark.usefixtures("refusing")
def test_the_runtime_asked_for_comes_first_and_refusals_are_said(
    models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_the_clock(
        monkeypatch, **{"onnxruntime original": 4 * MILLISECOND, "torch original": 2 * MILLISECOND}
    )
    rows, refused = on_runtimes(models, EXAMPLE, engine_named("onnxruntime"), [1, 2], 1.0)
    assert [(r.runtime, r.batch_size, r.ratio) for r in rows] == [
        ("onnxruntime", 1, 0.25), ("torch", 1, 0.5), ("onnxruntime", 2, 0.25), ("torch", 2, 0.5),
    ]  # fmt: skip
    assert refused == ("OpenVINO does not take the network: it is too new.",)


@pytest.mark.usefixtures("refusing")
def test_a_refusal_of_the_runtime_asked_for_is_an_error(models: dict[str, nn.Module]) -> None:
    with pytest.raises(ModelError, match="OpenVINO does not take the network"):
        on_runtimes(models, EXAMPLE, Engine("openvino", "1"), [1], 1.0)


def test_one_network_alone(models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    stop_the_clock(monkeypatch, **{"onnxruntime network": 3 * MILLISECOND})
    alone = {"compressed": models["compressed"]}
    rows, _ = on_runtimes(alone, EXAMPLE, engine_named("onnxruntime"), [2], 1.0)
    assert (rows[0].runtime, rows[0].seconds, rows[0].ratio) == ("onnxruntime", 3 * MILLISECOND, 1)


def test_networks_that_take_one_memory_format_are_timed_in_that(
    models: dict[str, nn.Module],
) -> None:
    (found,) = time_runtimes({"torch": models["dense"]}, {}, EXAMPLE, [2], 0.01)
    assert found.seconds > 0


class Bound(nn.Module):
    """Its forward computes with the batch size, so that each size has a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) / len(list(x))


def test_networks_bound_to_a_batch_size_are_exported_for_each() -> None:
    model = Bound().eval()
    networks, problems = exported(model, [EXAMPLE, EXAMPLE.expand(3, -1, -1, -1)])
    assert problems == ()
    for count in (1, 3):
        inputs = EXAMPLE.expand(count, -1, -1, -1)
        torch.testing.assert_close(networks["onnxruntime"](inputs), model(inputs))
