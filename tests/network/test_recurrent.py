"""Recurrent layers are counted, named, and kept with the reason."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from workbench import command

from compress.network.baseline import prepare


class Reader(nn.Module):
    """An LSTM in two directions, a cell that is called at every step, and one never called."""

    input_shape = (5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 4, bidirectional=True, batch_first=True)
        self.cell = nn.GRUCell(8, 3)
        self.alias = self.cell
        self.spare = nn.RNN(2, 2)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        h = y.new_zeros(len(x), 3)
        for step in range(y.shape[1]):
            h = self.cell(y[:, step], h)
        return self.head(h)


def reader() -> nn.Module:
    return Reader().eval()


LSTM = 5 * 2 * 4 * 4 * (6 + 4)
CELL = 5 * 3 * 3 * (8 + 3)


def test_recurrent_layers_are_found_with_their_cost() -> None:
    network = prepare(reader(), torch.randn(1, 5, 6))
    lstm, cell, spare = network.recurrent
    assert (lstm.name, lstm.kind, lstm.shape, lstm.calls) == ("lstm", "LSTM", "6→4", 1)
    assert (cell.name, cell.aliases, cell.calls) == ("cell", ("cell", "alias"), 5)
    assert (lstm.macs, cell.macs, spare.macs) == (LSTM, CELL, 0)
    assert (cell.params, spare.calls) == (3 * 3 * (8 + 3) + 18, 0)
    assert lstm.reason.startswith("weights of an LSTM: ")
    assert cell.reason.startswith("weights of a GRUCell: ")
    assert [site.name for site in network.sites] == ["head"]
    assert network.macs == LSTM + CELL + 9


def test_inspect_lists_them(tmp_path: Path) -> None:
    torch.save(reader().state_dict(), tmp_path / "weights.pt")
    spec = f"{Path(__file__)}:reader"
    found = command("inspect", str(tmp_path / "weights.pt"), "--model", spec)
    assert found.exit_code == 0, found.stderr
    assert "Kept lstm: weights of an LSTM: it computes" in found.stdout
    assert "Kept cell: weights of a GRUCell: it computes" in found.stdout
    row = next(line for line in found.stdout.splitlines() if line.startswith("lstm"))
    assert row.split()[1:4] == ["LSTM", "6→4", "kept"]


def test_networks_without_any_run_no_more_often() -> None:
    assert prepare(nn.Linear(3, 2), torch.randn(1, 3)).recurrent == ()
