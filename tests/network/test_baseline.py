"""The dense baseline: which memory format it is calibrated in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.network.baseline import Evidence, prepare


class Viewing(nn.Module):
    """Flattens by ``view``, which takes contiguous activations alone."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4 * 36, 5)
        self.method = method

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(getattr(self.conv(images), self.method)(len(images), -1))


@pytest.mark.parametrize(
    ("model", "example", "wanted"),
    [
        (Viewing("reshape"), torch.randn(1, 3, 8, 8), "channels_last"),
        (Viewing("view"), torch.randn(1, 3, 8, 8), "contiguous"),
        (nn.Linear(7, 3), torch.randn(1, 7), "contiguous"),
    ],
    ids=["reshape", "view", "no images"],
)
def test_the_baseline_runs_in_channels_last_where_it_can(
    model: nn.Module, example: Tensor, wanted: str
) -> None:
    network = prepare(model, example)
    assert network.memory_format == wanted
    assert all(p.is_contiguous() for p in network.model.parameters())


@pytest.mark.parametrize(
    "model",
    [
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    ],
    ids=["layer", "encoder"],
)
def test_a_network_that_is_itself_a_block_of_attention_is_unpacked(model: nn.Module) -> None:
    x = torch.randn(1, 5, 8)
    network = prepare(model.eval(), x)
    torch.testing.assert_close(network.model(x), model(x), rtol=1e-4, atol=1e-5)
    assert any(site.skip is None for site in network.sites)


def evidence(batch: Tensor, targets: tuple[object, ...] = ()) -> Evidence:
    return Evidence(targets or (-1,) * len(batch), lambda: batch)


class Recurrent(nn.Module):
    """Gives an output for each image, and the states of its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 6, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.rnn(x)


@pytest.mark.parametrize("images", [2, 5])
def test_states_that_do_not_lie_image_by_image_do_not_count(images: int) -> None:
    x = torch.randn(images, 3, 4)
    network = prepare(Recurrent().eval(), x[:1], evidence(x))
    assert [part.path for part in network.reading.parts] == ["[0]"]
    before, after = (network.original(y) for y in (x, x + 1))
    assert network.reading.divergence(before, after).shape == (images,)


def test_rows_that_are_no_images_are_values() -> None:
    class ByPosition(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).flatten(0, 1)

    x = torch.randn(6, 3, 4)
    reading = prepare(ByPosition().eval(), x[:1], evidence(x, (0, 1, 2, 3, 4, 0))).reading
    assert reading.kind == "values"
    assert "not that of the images" in reading.why
    assert not reading.ranked
