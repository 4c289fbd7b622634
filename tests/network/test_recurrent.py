"""Recurrent layers are counted, named, and kept with the reason."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from workbench import command

from compress.network.baseline import prepare
from compress.pipeline.run import compress_model
from compress.report import read_report
from compress.report.build import layers_sentence


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


def test_a_report_lists_them_with_cost_and_reason(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(32, 5, 6)
    made = compress_model(
        reader(), inputs, rank={"head": "1"}, force_rank=True, no_latency=True, refit=False,
        output=str(tmp_path / "out"),
    )  # fmt: skip
    head, *kept = made.result.layers
    assert (head.name, head.scheme) == ("head", "output")
    assert [(x.name, x.kind, x.scheme) for x in kept] == [
        ("lstm", "LSTM", "dense"), ("cell", "GRUCell", "dense"), ("spare", "RNN", "dense"),
    ]  # fmt: skip
    assert [(x.dense_macs, x.macs) for x in kept] == [(LSTM, LSTM), (CELL, CELL), (0, 0)]
    assert kept[1].bytes == 4 * kept[1].params == 4 * (3 * 3 * (8 + 3) + 18)
    # With the rows of all other layers, they make up the whole.
    assert made.result.cost.folded is not None
    assert sum(x.dense_macs for x in made.result.layers) == made.result.cost.folded.macs
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "weights of an LSTM: it computes all of its steps itself" in text
    report = read_report(tmp_path / "out")
    assert "1 of 4 layers rewritten" in layers_sentence(report)
