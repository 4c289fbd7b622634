"""Fixtures that the rooms share."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from stopwatch import stop_the_clock
from workbench import Workbench, trained


@functools.cache
def _trained() -> torch.nn.Module:
    return trained()


@pytest.fixture(autouse=True)
def same_weights() -> None:
    """Networks that a test makes are the same whatever ran before it in the same process."""
    torch.manual_seed(0)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    """A workbench with the trained network, and networks timed without spending seconds on it."""

    stop_the_clock(monkeypatch)
    return Workbench.make(tmp_path, _trained())
