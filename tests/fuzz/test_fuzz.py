"""Damaged and hostile files of every kind: an error of this package, or a result; nothing else.

A bounded part of what ``scripts/fuzz`` does at length. Each case runs in a process whose memory is
bounded, under an alarm; a failure says how to repeat it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.cases import flipped
from fuzz.kinds import DIGESTED, KINDS
from fuzz.runner import NAMES, Worker

from compress.errors import CompressError

CASES = 50  # of each kind; two of them through the command line
SEED = 1


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as one:
        yield one


def test_every_kind_has_a_name_on_the_command_line() -> None:
    assert list(NAMES) == list(KINDS)


@pytest.mark.parametrize("name", NAMES)
def test_valid_files_are_read(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    for data in kind.valid():
        path = tmp_path / f"case{kind.suffix}"
        path.write_bytes(data)
        kind.read(path)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_end_in_a_result_or_an_error_of_the_package(
    worker: Worker, name: str
) -> None:
    failures, counts = worker.run(name, SEED, 0, CASES)
    assert not failures, "\n".join(map(str, failures))
    assert counts.total() == CASES
    assert counts["refused"]


def test_a_flipped_bit_in_what_a_digest_vouches_for_is_refused(tmp_path: Path) -> None:
    for name in sorted(DIGESTED):
        kind = KINDS[name]
        for seed in range(5):
            path = tmp_path / f"case{kind.suffix}"
            path.write_bytes(flipped(kind, seed))
            with pytest.raises(CompressError):
                kind.read(path)
