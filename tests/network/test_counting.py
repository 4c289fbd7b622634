"""Multiply-accumulates of whole networks, against sums by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.network.baseline import prepare
from compress.network.counting import count_macs, macs_by_module


class Mixed(nn.Module):
    """What is no layer of any registered kind, and what is computed without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.video = nn.Conv3d(3, 4, 3)
        self.rows = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 2)
        self.free = nn.Parameter(torch.rand(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.video(x).mean((3, 4)).transpose(1, 2)
        y, _ = self.rows(y)
        return F.linear(self.head(y), self.free)


VIDEO = 4 * 3 * 27 * 2 * 6 * 6
ROWS = 2 * 4 * 5 * (4 + 5)
HEAD, FREE = 2 * 5 * 2, 2 * 2 * 7


def test_everything_that_runs_is_counted() -> None:
    model, x = Mixed().eval(), torch.rand(1, 3, 4, 8, 8)
    assert count_macs(model, x) == VIDEO + ROWS + HEAD + FREE
    assert macs_by_module(model, x) == {"video": VIDEO, "rows": ROWS, "head": HEAD, "": FREE}


def test_what_is_no_layer_is_named() -> None:
    network = prepare(Mixed(), torch.rand(1, 3, 4, 8, 8))
    assert [site.name for site in network.sites] == ["video", "head"]
    assert network.elsewhere == {"rows": ROWS, "": FREE}
    assert network.macs == VIDEO + ROWS + HEAD + FREE


def test_attention_is_counted_and_settings_stay() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x, fast = torch.rand(1, 5, 8), torch.backends.mha.get_fastpath_enabled()
    projections, products, rest = 4 * 5 * 8 * 8, 2 * 5 * 5 * 8, 2 * 5 * 8 * 16
    assert count_macs(layer, x) == projections + products + rest
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_shared_layers_count_once_per_call() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert count_macs(model, torch.rand(1, 4)) == 32


class Sharing(nn.Module):
    """A layer beside two blocks that both call it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.first, self.second = Calling(self.shared), Calling(self.shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Calling(nn.Module):
    """A layer of its own after one that it shares."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared = shared
        self.own = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.shared(x)) @ self.shared.weight


def test_what_blocks_share_counts_for_itself_and_not_for_them() -> None:
    network = prepare(Sharing(), torch.rand(1, 4))
    assert macs_by_module(network.model, torch.rand(1, 4)) == {
        "shared": 32, "first": 16, "first.own": 16, "second": 16, "second.own": 16,
    }  # fmt: skip
    assert network.macs == count_macs(network.model, torch.rand(1, 4)) == 96


class ClassToken(nn.Module):
    """Passes a view of a parameter to its block, together with the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.rand(1, 1, 4))
        self.block = Joined()

    def forward(self, x: Tensor) -> Tensor:
        return self.block((self.token.expand(len(x), -1, -1), x))


class Joined(nn.Module):
    """A layer for two inputs, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        return self.layer(torch.cat(both, 1))


def test_views_of_parameters_are_no_obstacle() -> None:
    model = ClassToken().eval()
    assert count_macs(model, torch.rand(1, 2, 4)) == 3 * 16
    assert macs_by_module(model, torch.rand(1, 2, 4)) == {"block.layer": 3 * 16}
    assert all(p.requires_grad for p in model.parameters())
