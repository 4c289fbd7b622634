"""Nested inputs and outputs: paths, changes, and what is left as it is."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from compress.running import structure


class Two(NamedTuple):
    left: Tensor
    right: Any


@dataclass(frozen=True)
class Frozen:
    boxes: Tensor
    names: tuple[str, ...]
    rest: Any = None


@dataclass
class Output(OrderedDict[str, Any]):
    """As those of transformers: made from keywords, a mapping and a dataclass."""

    scores: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        self.update({k: v for k, v in vars(self).items() if v is not None})


A, B = torch.rand(2, 3), torch.arange(4).reshape(2, 2)


@pytest.mark.parametrize(
    ("value", "paths"),
    [
        (A, [""]),
        ((A, B), ["[0]", "[1]"]),
        ([A, None, 3, "x"], ["[0]"]),
        ({"out": {"aux": A}, "maps": [B]}, ["out.aux", "maps[0]"]),
        ({"not a name": A, 3: B}, ["['not a name']", "['3']"]),
        ((A, [Two(A, {"scores": B})]), ["[0]", "[1][0].left", "[1][0].right.scores"]),
        (Frozen(A, ("a",), [B]), ["boxes", "rest[0]"]),
        (SimpleNamespace(logits=A), ["logits"]),
        (Output(hidden=(A, B)), ["hidden[0]", "hidden[1]"]),
    ],
)  # fmt: skip
def test_paths_and_changes(value: Any, paths: list[str]) -> None:
    found = structure.tensors(value)
    assert list(found) == paths
    doubled = structure.mapped(value, lambda t: t * 2)
    assert type(doubled) is type(value)
    assert list(structure.tensors(doubled)) == paths
    for path, tensor in structure.tensors(doubled).items():
        assert torch.equal(tensor, 2 * found[path])
    again = structure.rebuilt(value, [t * 2 for t in found.values()])
    for path, tensor in structure.tensors(again).items():
        assert torch.equal(tensor, 2 * found[path])


def test_what_is_no_tensor_is_left() -> None:
    found = structure.mapped(Frozen(A, ("a", "b"), 7), lambda t: t + 1)
    assert (found.names, found.rest) == (("a", "b"), 7)
    assert structure.tensors("text") == {}


def test_batches_are_joined_and_parted() -> None:
    batch = {"x": A, "ids": B}
    twice = structure.concatenated([batch, batch])
    assert structure.count(twice) == 4
    assert torch.equal(structure.part(twice, 2, None)["ids"], B)
    assert structure.arguments(batch) == ((), batch)
    assert structure.arguments((A, B))[0] == (A, B)
    wide = structure.expanded(structure.part(batch, 0, 1), 5)
    assert {k: tuple(t.shape) for k, t in wide.items()} == {"x": (5, 3), "ids": (5, 2)}


def test_whole_numbers_keep_their_type() -> None:
    half = structure.like_weights({"x": A, "ids": B}, torch.zeros(1, dtype=torch.float16))
    assert (half["x"].dtype, half["ids"].dtype) == (torch.float16, torch.int64)
    grown = structure.with_gradients((A, B))
    assert grown[0].requires_grad
    assert not grown[1].requires_grad
    assert not A.requires_grad


def test_a_mapping_that_is_made_otherwise_becomes_a_plain_one() -> None:
    given: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(()), a=torch.ones(2))
    found = structure.mapped(given, lambda t: t + 1)
    assert found.keys() == {"a"}
    assert found["a"].tolist() == [2, 2]


def test_a_checksum_tells_numbers_apart_and_nothing_else() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert structure.checksum((x, {"y": x})) == structure.checksum([x.clone(), x.t().t()])
    assert structure.checksum(x) != structure.checksum(x + 1)
    assert structure.checksum(x.bfloat16()) != structure.checksum(x.half())
