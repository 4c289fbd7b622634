"""Checkpoints that announce more than they hold, and such as never end."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import CheckpointError
from compress.inputs.checkpoint import read_checkpoint

ONE = torch.zeros(1)


class Call:
    """Pickled as a call of a function that weights-only loading allows."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


def tensor(offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Call:
    rebuild = torch._utils._rebuild_tensor_v2
    typed = torch.storage.TypedStorage
    storage = typed(wrap_storage=ONE.untyped_storage(), dtype=ONE.dtype, _internal=True)
    return Call(rebuild, storage, offset, size, stride, False, {})


def itself() -> dict[str, Any]:
    made: dict[str, Any] = {"weight": ONE}
    made["model"] = made
    return made


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"w": ONE.expand(1 << 40)}, "times as many"),
        ({f"w{i}": ONE.expand(1 << 23) for i in range(99)}, "times as many"),
        ({"w": tensor(0, (1 << 30,), (1,))}, "in a storage of 1 numbers"),
        ({"w": tensor(1, (1,), (1,))}, "in a storage of 1 numbers"),
        ({"w": tensor(0, (2, 1), (1, 1))}, "in a storage of 1 numbers"),
        ({"w": Call(bytearray, 1 << 40)}, "a bytearray larger than itself"),
        ({"w": Call(torch.FloatTensor, 1 << 40)}, "a FloatTensor larger than itself"),
        (itself(), "without end"),
        ({"model": {"x" * 1001: ONE}}, "no name"),
        ({"module." * 10_000: ONE}, "no name"),
        ({None: ONE}, "no name"),
        ({((((1,),),),): ONE}, "no name"),
    ],
)
def test_traps_are_refused(
    tmp_path: Path, content: dict[Any, Any], words: str, *, legacy: bool
) -> None:
    path = tmp_path / "a.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_honest_tensors_that_share_numbers_are_read(tmp_path: Path, *, legacy: bool) -> None:
    path = tmp_path / "a.pt"
    base = torch.arange(12.0)
    content = {
        "expanded": ONE.expand(1000),
        "strided": base.view(3, 4).t(),
        "offset": base[5:9],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "none": base[:0],
    }
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    state = read_checkpoint(path).state
    assert all(torch.equal(state[name], content[name]) for name in content)


def test_a_storage_that_the_archive_does_not_hold_is_refused(tmp_path: Path) -> None:
    """torch would read on in memory that is not the file's."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.zeros(256)}, path)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, body in members.items():
            new.writestr(name, body[:8] if name.endswith("data/0") else body)
    with pytest.raises(CheckpointError, match="should have 1,024 bytes and has 8"):
        read_checkpoint(path)
