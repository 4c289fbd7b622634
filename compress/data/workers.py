"""Batches from worker processes that are watched: one that dies or hangs is an error."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pickle import PicklingError
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from compress.data.images import ImageSet
from compress.errors import DataError, one_line

# How often workers are looked at while a batch is awaited, and for how long one is awaited in all.
CHECK_SECONDS = 5.0
PATIENCE_SECONDS = 300.0

_HERE = "--workers 0, which reads the images in this process"


def batches_from_workers(
    images: ImageSet, chunks: Sequence[Sequence[int]], workers: int
) -> Iterator[tuple[Any, Any] | DataError]:
    """Yield the batches of some chunks of a set, read by worker processes.

    Args:
        images: The set.
        chunks: Positions in it, batch by batch.
        workers: How many processes read, at most one a chunk.

    Yields:
        What `ImageSet.batch` returns for a chunk, or what is wrong with one of its images.

    Raises:
        DataError: The workers cannot be started, one of them died, or no batch came for
            `PATIENCE_SECONDS`.
    """
    described = images.source.described
    started, processes = _started(_Batches(images, chunks), min(workers, len(chunks)), described)
    try:
        for _ in chunks:
            waited, batch = 0.0, None
            while batch is None:
                problem = ""
                try:
                    batch = next(started)
                except (RuntimeError, OSError, EOFError) as error:
                    problem = _problem(error, processes, waited)
                waited += CHECK_SECONDS
                # Raised out here, so that nothing of torch's holds the workers any longer.
                if problem:
                    raise DataError(f"The images of {described} cannot be read: {problem}.")
            yield batch
    finally:
        del started  # ends the workers now


class _Batches(Dataset["tuple[Any, Any] | DataError"]):
    """Whole batches by number, for worker processes.

    An error travels as a value: torch would re-raise it with the worker's traceback as its text.
    """

    def __init__(self, images: ImageSet, chunks: Sequence[Sequence[int]]) -> None:
        self.images, self.chunks = images, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> tuple[Any, Any] | DataError:
        try:
            return self.images.batch(self.chunks[index])
        except DataError as error:
            return error


def _started(
    stacks: _Batches, workers: int, described: str
) -> tuple[Iterator[Any], list[BaseProcess]]:
    """Start workers; return what they give and who they are."""
    loader = DataLoader(
        stacks,
        batch_size=None,
        num_workers=workers,
        timeout=CHECK_SECONDS,
        generator=torch.Generator(),  # else it draws from the global random state
    )
    before = set(multiprocessing.active_children())
    try:
        with _no_alarm_of_torch():
            started = iter(loader)
    # No more processes or memory; or, where processes are not forked, a Dataset that is no pickle.
    except (OSError, RuntimeError, PicklingError, AttributeError, TypeError) as error:
        raise DataError(
            f"The {workers} worker processes that are to read the images of {described} cannot be "
            f"started: {one_line(error)}; pass fewer --workers, or {_HERE}."
        ) from error
    return started, [p for p in multiprocessing.active_children() if p not in before]


@contextmanager
def _no_alarm_of_torch() -> Iterator[None]:
    """Undo the signal handler that torch sets when it first starts workers.

    It raises wherever the main thread is when a worker dies, so that a model's forward would seem
    to have failed. Workers are looked at here instead.
    """
    alarm = getattr(signal, "SIGCHLD", None)
    if alarm is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(alarm)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(alarm, before)


def _problem(error: Exception, processes: Sequence[BaseProcess], waited: float) -> str:
    """Say what keeps a batch; ``""`` where it may still come.

    Raises:
        Exception: It came to a worker itself, as it could have come here.
    """
    if "in DataLoader worker process" in str(error):
        raise error
    if isinstance(error, OSError | EOFError):  # a connection broke, whose end may take a moment
        wait([process.sentinel for process in processes], timeout=1)
    dead = [process.exitcode for process in processes if process.exitcode is not None]
    if dead or isinstance(error, OSError | EOFError) or "exited unexpectedly" in str(error):
        how = _ending(dead[0]) if dead else ""
        return (
            f"a worker process died{how}; it may have run out of memory or of shared memory "
            f"(/dev/shm). Pass fewer --workers, a smaller --batch-size, or {_HERE}"
        )
    if "timed out" not in str(error):
        return f"{one_line(error)}; pass {_HERE}"
    if waited + CHECK_SECONDS < PATIENCE_SECONDS:
        return ""
    for process in processes:
        process.kill()  # they would not end when they are asked to
    return (
        f"the worker processes gave no batch for {PATIENCE_SECONDS:g} seconds and seem to hang; "
        f"pass {_HERE}"
    )


def _ending(code: int) -> str:
    if code >= 0:
        return f" with exit code {code}"
    try:
        return f" by the signal {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f" by the signal {-code}"
