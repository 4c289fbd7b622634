"""Code of the user's that ends the program: never silently, and never as Ctrl-C."""

from __future__ import annotations

import pytest
from networks.tiny import Tiny
from workbench import SPEC, Workbench, command, paragraph

# What may end the program in the user's code, other than an exception.
ENDINGS = {
    "exit": ("raise SystemExit('enough')", "SystemExit: enough"),
    "exit 0": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "cancelled": ("import asyncio; raise asyncio.CancelledError('enough')", "CancelledError"),
    "own": ("raise type('Own', (BaseException,), {})('enough')", "Own: enough"),
}
CODE = """
import torch
from networks.tiny import Tiny

def end():
    {statement}

class Set(torch.utils.data.Dataset):
    def __init__(self, where): self.where = where
    def __len__(self):
        if self.where == 'len': end()
        return 48
    @property
    def classes(self):
        if self.where == 'classes': end()
        return ['a', 'b', 'c']
    def __getitem__(self, index):
        if index >= 40 and self.where == 'item': end()
        return torch.rand(1, 8, 8), index % 3

class Net(Tiny):
    def forward(self, x):
        end()

class Late(Tiny):
    calls = 0
    def forward(self, x):
        Late.calls += 1
        if Late.calls > 12: end()
        return super().forward(x)

class Stuck(Tiny):
    def __deepcopy__(self, memory):
        end()

def data(where): return Set(where)
def broken(): end()
def net(): return Net()
def late(): return Late()
def stuck(): return Stuck()
def metric(model, batches): end()
def loss(outputs, labels): end()
"""
WHERE = {
    "factory": ({"model": ":broken"}, ":broken raised"),
    "forward": ({"model": ":net"}, "forward failed"),
    "late forward": ({"model": ":late"}, ""),
    "copy": ({"model": ":stuck"}, "cannot be copied"),
    "length": ({"data": ":data?where=len"}, ":data?where=len cannot be used: its length raised"),
    "classes": ({"data": ":data?where=classes"}, "its classes raised"),
    "item": ({"data": ":data?where=item"}, ":data?where=item cannot be read"),
    "test item": ({"test": ":data?where=item"}, ":data?where=item cannot be read"),
    "metric": ({"metric-fn": ":metric"}, ":metric raised"),
    "loss": ({"loss-fn": ":loss"}, ":loss raised"),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("where", WHERE)
def test_code_that_ends_the_program_is_an_error(bench: Workbench, where: str, ending: str) -> None:
    statement, words = ENDINGS[ending]
    code = bench.folder.parent / f"{bench.folder.name}.py"
    code.write_text(CODE.format(statement=statement))
    given, says = WHERE[where]
    named = {flag: f"{code}{spec}" for flag, spec in given.items()}
    text = paragraph(bench.run("--rank", "conv2=4", **named), 3)
    assert words in text
    assert says in text
    assert f"{code.name}, line 6" in text or where == "copy"
    assert bench.leftovers() == []


@pytest.mark.parametrize("flag", ["--model", "--data", "--test", "--metric-fn", "--loss-fn"])
def test_modules_that_end_the_program_when_imported(bench: Workbench, flag: str) -> None:
    code = bench.folder.parent / f"{bench.folder.name}.py"
    code.write_text("import asyncio\nraise asyncio.CancelledError('enough')\n")
    given = {"model": SPEC, "data": bench.train, "test": bench.test, flag[2:]: f"{code}:net"}
    text = paragraph(bench.run("--rank", "conv2=4", **given), 3)
    assert f"Importing {code} raised CancelledError: enough at {code.name}, line 2" in text


def test_interrupts_in_the_users_code_stay_interrupts(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tiny, "forward", interrupted)
    result = bench.run("--rank", "conv2=4", model="networks.tiny:tiny")
    assert result.exit_code == 130


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["--version"]])
def test_help_still_ends_well(words: list[str]) -> None:
    assert command(*words).exit_code == 0
