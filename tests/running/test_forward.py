"""What is said where a network's forward fails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.running.forward import evaluation_mode, require_tensors, run_model


class Failing(nn.Module):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def forward(self, _: Tensor) -> Tensor:
        raise RuntimeError(self.text)


@pytest.mark.parametrize(
    "text",
    [
        "Couldn't load custom C++ ops. This can happen if your PyTorch and torchvision versions...",
        "Could not run 'torchvision::nms' with arguments from the 'CPU' backend.",
    ],
)
def test_missing_operators_of_torchvision_are_not_blamed_on_the_images(text: str) -> None:
    with pytest.raises(ModelError, match="torchvision of the same build") as caught:
        run_model(Failing(text), torch.zeros(1, 3, 8, 8))
    assert "--resize" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.Conv1d(2, 4, 3), nn.Linear(8, 4)])
def test_a_number_type_of_the_forwards_own_is_not_blamed_on_the_images(
    layer: nn.Module, dtype: torch.dtype
) -> None:
    class Converting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.to(dtype))

    with pytest.raises(ModelError, match="to the type of the layer that follows") as caught:
        run_model(Converting().eval(), torch.rand(1, 2, 8))
    assert "Check" not in str(caught.value)


def test_other_failures_name_the_shape_and_what_to_check() -> None:
    with pytest.raises(ModelError, match=r"\(1, 3, 8, 8\): too small\. Check .*--resize"):
        run_model(Failing("too small.\nand more"), torch.zeros(1, 3, 8, 8))


def test_buffers_that_a_forward_makes_or_fills_are_gone_again() -> None:
    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("filled", None)
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            self.filled = x.detach().sum()
            self.register_buffer("made", x.detach().clone(), persistent=False)
            return x * self.weight

    model = Grid()
    with evaluation_mode(model):
        run_model(model, torch.ones(2))
    assert model.state_dict().keys() == {"weight"}
    assert dict(model._buffers) == {"filled": None}
    assert not model._non_persistent_buffers_set


def test_a_state_that_is_no_tensor_is_refused() -> None:
    class Scaled(nn.Linear):
        def get_extra_state(self) -> dict[str, float]:
            return {"scale": 2.0}

        def set_extra_state(self, state: object) -> None:
            del state

    with pytest.raises(ModelError, match=r"0\._extra_state"):
        require_tensors(nn.Sequential(Scaled(2, 2)))
