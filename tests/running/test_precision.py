"""Mixed precision: what computes in it, and what comes out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.running.forward import run_model, run_with_gradients
from compress.running.precision import computes_in_bfloat16, in_mixed_precision


def layer() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(8, 4)


def test_layers_compute_in_bfloat16_and_outputs_and_gradients_are_in_single_precision() -> None:
    model = layer()
    images = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    seen: list[torch.dtype] = []
    model.register_forward_hook(lambda _, __, result: seen.append(result.dtype))
    found = in_mixed_precision(run_with_gradients, "cpu")(model, images)
    assert seen == [torch.bfloat16]
    assert found.dtype == torch.float32
    found.sum().backward()
    assert model.weight.dtype == torch.float32
    # Each output's gradient is the sum of the images, rounded to eight bits.
    torch.testing.assert_close(
        model.weight.grad, images.sum(0).expand(4, 8), rtol=2**-6, atol=2**-6
    )
    exact = images.bfloat16() @ model.weight.detach().bfloat16().T + model.bias.detach().bfloat16()
    torch.testing.assert_close(found.detach(), exact.float(), rtol=2**-6, atol=2**-6)


def test_all_that_a_network_returns_is_in_single_precision() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()

        def forward(self, images: Tensor) -> dict[str, Any]:
            result = self.layer(images)
            return {"scores": result, "likely": [result.argmax(1), images.double()]}

    found = in_mixed_precision(run_model, "cpu")(Two(), torch.randn(5, 8))
    assert found["scores"].dtype == torch.float32
    assert [t.dtype for t in found["likely"]] == [torch.int64, torch.float64]


@pytest.mark.parametrize(
    ("able", "expected"),
    [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx2": True}, False)],
)
def test_a_processor_says_whether_it_has_bfloat16(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert computes_in_bfloat16("cpu") is expected
    assert not computes_in_bfloat16("meta")


def test_an_older_torch_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not computes_in_bfloat16("cpu")


@pytest.mark.parametrize("able", [True, False])
def test_a_gpu_has_bfloat16_where_it_is_not_emulated(
    monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    asked: dict[str, Any] = {}

    def supported(**settings: Any) -> bool:
        asked.update(settings)
        return able

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert computes_in_bfloat16(torch.device("cuda", 0)) is able
    assert asked == {"including_emulation": False}
