"""What low rank would do for an LSTM or GRU: multiply-accumulates and time on a CPU.

Torch runs all steps of such a layer in one fused call. Each row stands for one way to run it: that
call; a loop over the steps with the same weights, or with both matrices of rank r; and a linear
layer to r channels before a fused layer that takes r inputs, which is the input matrix alone of
rank r. All take turns in one process, and the times are medians. Run from a checkout, in the
project's environment:

    python scripts/bench/recurrent.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from compress.timing.turns import measure

Fused = nn.LSTM | nn.GRU
Cell = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def lstm_step(x: Tensor, recurrent: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step from what the two matrices give ``[B, 4 H]``, the gates in torch's order."""
    i, f, g, o = (x + recurrent).chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(x: Tensor, recurrent: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One step from what the two matrices give ``[B, 3 H]``."""
    x_r, x_z, x_n = x.chunk(3, dim=1)
    h_r, h_z, h_n = recurrent.chunk(3, dim=1)
    z = (x_z + h_z).sigmoid()
    h = (1 - z) * (x_n + (x_r + h_r).sigmoid() * h_n).tanh() + z * h
    return h, h


class Loop(nn.Module):
    """A recurrent layer step by step, its two matrices as chains of linear layers."""

    def __init__(self, like: Fused, rank: int | None) -> None:
        super().__init__()
        self.hidden = like.hidden_size
        self.step: Cell = lstm_step if isinstance(like, nn.LSTM) else gru_step
        self.inputs = chain(like.weight_ih_l0, like.bias_ih_l0, rank)
        self.recurrent = chain(like.weight_hh_l0, like.bias_hh_l0, rank)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.inputs(x)  # of all steps at once
        h = state = x.new_zeros(len(x), self.hidden)
        outputs = []
        for step in range(x.shape[1]):
            h, state = self.step(gates[:, step], self.recurrent(h), state)
            outputs.append(h)
        return torch.stack(outputs, dim=1)


class NarrowInput(nn.Module):
    """A linear layer to r channels, then torch's own recurrent layer."""

    def __init__(self, like: Fused, rank: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(like.input_size, rank, bias=False)
        self.rest = type(like)(rank, like.hidden_size, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.narrow(x))[0]


def chain(weight: Tensor, bias: Tensor, rank: int | None) -> nn.Module:
    """The best factors of a matrix at a rank; the matrix itself without one."""
    outputs, inputs = weight.shape
    last = nn.Linear(inputs if rank is None else rank, outputs)
    last.bias = nn.Parameter(bias.detach().clone())
    if rank is None:
        last.weight = nn.Parameter(weight.detach().clone())
        return last
    left, values, right = torch.linalg.svd(weight.detach(), full_matrices=False)
    first = nn.Linear(inputs, rank, bias=False)
    first.weight = nn.Parameter(right[:rank].contiguous())
    last.weight = nn.Parameter((left * values)[:, :rank].contiguous())
    return nn.Sequential(first, last)


def multiplications(module: nn.Module, steps: int) -> int:
    """Multiply-accumulates a sequence: every weight once a step."""
    return steps * sum(p.numel() for p in module.parameters() if p.dim() == 2)


def rows(kind: type[Fused], size: int, ranks: list[int]) -> dict[str, nn.Module]:
    """The ways to run one layer, checked against torch's own."""
    torch.manual_seed(0)
    fused = kind(size, size, batch_first=True)
    found: dict[str, nn.Module] = {"fused": fused, "loop": Loop(fused, None)}
    for rank in ranks:
        found[f"loop, both of rank {rank}"] = Loop(fused, rank)
    for rank in ranks:
        found[f"fused, input of rank {rank}"] = NarrowInput(fused, rank)
    x = torch.randn(2, 5, size)
    for name in ("loop", f"loop, both of rank {size}"):
        module = found.get(name) or Loop(fused, size)
        torch.testing.assert_close(module(x), fused(x)[0], rtol=1e-3, atol=1e-4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="inputs and hidden units")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--ranks", default="64,128")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time, on a busy machine")
    given = parser.parse_args()
    clock = time.process_time if given.cpu_time else time.perf_counter
    torch.set_num_threads(given.threads)
    batches = [int(b) for b in given.batches.split(",")]
    ranks = [int(r) for r in given.ranks.split(",")]
    times = " | ".join(f"batch {b}" for b in batches)
    print(f"| layer | MACs | {times} |\n| --- | ---: |{' ---: |' * len(batches)}")
    with torch.no_grad():
        for kind in (nn.LSTM, nn.GRU):
            modules = rows(kind, given.size, ranks)
            columns = []
            for batch in batches:
                x = torch.randn(batch, given.steps, given.size)
                runs = [partial(m, x) for m in modules.values()]
                columns.append(measure(runs, rounds=9, clock=clock))
            whole = multiplications(modules["fused"], given.steps)
            for index, (name, module) in enumerate(modules.items()):
                share = multiplications(module, given.steps) / whole
                cells = [f"{column[index] * 1e3:.1f} ms" for column in columns]
                row = [f"{kind.__name__}, {name}", f"\N{MULTIPLICATION SIGN}{share:.2f}", *cells]
                print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
