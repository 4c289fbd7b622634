"""Worker processes that die, hang or cannot be started."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from workbench import Workbench, paragraph

from compress.data import ImageSet, Preprocessing, batches, open_dataset
from compress.errors import DataError

# A set whose items end, kill or stop the process that reads them, where that is a worker.
SET = """
import os, signal, time, torch
from torch.utils.data import Dataset, get_worker_info

class Set(Dataset):
    def __init__(self, how):
        self.how = how
    def __len__(self):
        return 48
    def __getitem__(self, index):
        if index >= 20 and get_worker_info() is not None:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "ended":
                os._exit(7)
            if self.how == "exits":
                raise SystemExit("enough")
            if self.how == "hangs":
                time.sleep(600)
            if self.how == "slow":
                time.sleep(0.5)
        return torch.full((1, 8, 8), index / 48), index % 3
"""


@pytest.fixture
def users(tmp_path: Path) -> str:
    (tmp_path / "sets.py").write_text(SET)
    return f"{tmp_path / 'sets.py'}:Set"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.data.workers.CHECK_SECONDS", 0.1)
    monkeypatch.setattr("compress.data.workers.PATIENCE_SECONDS", 1.0)


def opened(spec: str) -> ImageSet:
    return open_dataset(spec, Preprocessing())


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("killed", "a worker process died by the signal SIGKILL; it may have run out of memory"),
        ("ended", "a worker process died with exit code 7"),
        ("hangs", "the worker processes gave no batch for 1 seconds and seem to hang"),
        ("exits", "SystemExit: enough at sets.py, line 17"),
    ],
)
def test_workers_that_end_or_hang(bench: Workbench, how: str, words: str) -> None:
    (bench.folder / "sets.py").write_text(SET)
    spec = f"{bench.folder / 'sets.py'}:Set?how={how}"
    text = paragraph(bench.run("--rank", "conv2=4", "--workers", "2", data=spec, test=None), 3)
    assert words in text
    assert how == "exits" or "--workers 0" in text
    assert spec in text
    assert "forward" not in text
    assert bench.leftovers() == ["sets.py"]
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("impatient")
def test_slow_workers_are_waited_for(users: str) -> None:
    images = opened(f"{users}?how=slow").subset(range(16, 24))
    assert sum(len(inputs) for inputs, _ in batches(images, 1, workers=2)) == 8


def test_a_death_is_told_where_images_are_read_and_nowhere_else(users: str) -> None:
    """Between two batches a forward may run, which would seem to have failed."""
    before = signal.getsignal(signal.SIGCHLD)
    loaded = iter(batches(opened(f"{users}?how=fine"), 1, workers=1))
    next(loaded)
    assert signal.getsignal(signal.SIGCHLD) is before
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    time.sleep(0.1)  # a signal's handler would run here
    with pytest.raises(DataError, match="died by the signal SIGKILL"):
        list(loaded)


def test_workers_work_in_another_thread(users: str) -> None:
    found: list[int] = []

    def read() -> None:
        found.extend(len(x) for x, _ in batches(opened(f"{users}?how=fine"), 16, workers=1))

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert found == [16, 16, 16]


def test_no_more_workers_than_batches(users: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data import DataLoader

    counts: list[int] = []

    def counted(*given: Any, num_workers: int, **more: Any) -> Any:
        counts.append(num_workers)
        return DataLoader(*given, num_workers=num_workers, **more)

    monkeypatch.setattr("compress.data.workers.DataLoader", counted)
    assert len(list(batches(opened(f"{users}?how=fine"), 24, workers=1000))) == 2
    assert counts == [2]


def test_workers_that_cannot_be_started(users: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("os.fork", refuse)
    with pytest.raises(DataError, match=r"2 worker processes .* cannot be started: .*unavailable"):
        list(batches(opened(f"{users}?how=fine"), 8, workers=2))


def test_a_damaged_picture_is_still_what_is_wrong_with_workers(tmp_path: Path) -> None:
    for index in range(8):
        Image.fromarray(np.full((8, 8), index, np.uint8)).save(tmp_path / f"{index}.png")
    (tmp_path / "5.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"5\.png cannot be read"):
        list(batches(opened(f"imagefolder:{tmp_path}"), 2, workers=2))
