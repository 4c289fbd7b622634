"""Cases in child processes, and the long run: ``python -m fuzz.runner``, as ``scripts/fuzz``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO

from fuzz.cases import SECONDS, Failure

TESTS = Path(__file__).resolve().parents[1]
NAMES = (
    "safetensors", "torch-zip", "torch-legacy", "index", "npz", "arrays", "idx", "picture", "plan",
    "report", "calibration", "latency", "sweep", "class-map", "toml", "result",
    "runtime",
)  # fmt: skip


class Worker:
    """A child process that runs cases, replaced where a case kills or hangs it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def run(
        self, kind: str, seed: int, first: int, count: int
    ) -> tuple[list[Failure], Counter[str]]:
        """Run cases of one kind; return those that failed, and how many ended in which way."""
        failures: list[Failure] = []
        counts: Counter[str] = Counter()
        stop = first + count
        while first < stop:
            at, ended = self._run_some(kind, seed, (first, stop), failures, counts)
            if ended is not None:
                failures.append(Failure(kind, seed, at, *ended))
                counts["failed"] += 1
            first = at + 1
        return failures, counts

    def _run_some(
        self, kind: str, seed: int, span: tuple[int, int], failures: list[Failure],
        counts: Counter[str],
    ) -> tuple[int, tuple[str, str] | None]:  # fmt: skip
        """Run until the end or until the child ends; return the last case and what ended it."""
        process = self._started()
        assert process.stdin is not None
        process.stdin.write(f"{kind} {seed} {span[0]} {span[1] - span[0]}\n")
        process.stdin.flush()
        at = span[0]
        while True:
            line = self._line()
            if line is None:
                self._end()
                return at, ("hang", f"no answer in {3 * SECONDS} s, not even to an alarm")
            if not line:
                code = process.wait()
                self._end()
                name = signal.Signals(-code).name if code < 0 else f"exit {code}"
                return at, ("crash", f"the process ended with {name}")
            if not line.startswith("{"):
                at = int(line)
                continue
            found = json.loads(line)
            if "counts" in found:
                counts.update(found["counts"])
                return span[1] - 1, None
            failures.append(Failure(**found))

    def _line(self) -> str | None:
        """The next line that the child says; empty where it has ended, None where it is silent."""
        try:
            # The first line waits for imports and for the valid files.
            return self._lines.get(timeout=3 * SECONDS)
        except queue.Empty:
            return None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(p for p in paths if p),
                "OMP_NUM_THREADS": "1",
            }
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fuzz.worker"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, text=True, env=environment,
            )  # fmt: skip
            self._lines = queue.Queue()
            threading.Thread(
                target=_hand_on, args=(self._process.stdout, self._lines), daemon=True
            ).start()
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process = None


def _hand_on(source: IO[str], lines: queue.Queue[str]) -> None:
    """Put every line into a queue, and an empty one at the end."""
    with source:
        for line in source:
            lines.put(line)
    lines.put("")


def run_all(kinds: list[str], cases: int, seed: int, first: int, processes: int) -> int:
    """Run cases of some kinds, print a summary and every failure; return how many failed."""
    share = -(-cases // len(kinds))
    pieces = [
        (kind, first + start, min(200, share - start))
        for kind in kinds
        for start in range(0, share, 200)
    ]
    workers: dict[int, Worker] = {}
    failures: list[Failure] = []
    table: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}

    def run(piece: tuple[str, int, int]) -> None:
        kind, start, count = piece
        worker = workers.setdefault(threading.get_ident(), Worker())
        found, counts = worker.run(kind, seed, start, count)
        failures.extend(found)
        table[kind].update(counts)
        for failure in found:
            print(failure, flush=True)

    try:
        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(run, pieces))
    finally:
        for worker in workers.values():
            worker.__exit__(None, None, None)
    print(f"\n{'kind':14}{'fine':>8}{'refused':>9}{'failed':>8}")
    for kind, counts in table.items():
        print(f"{kind:14}{counts['fine']:8}{counts['refused']:9}{counts['failed']:8}")
    print(f"{sum(c.total() for c in table.values())} cases, {len(failures)} failures, seed {seed}")
    return len(failures)


def main() -> None:
    """Parse the arguments of ``scripts/fuzz``, run, and exit with 1 where a case failed."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("cases", nargs="?", type=int, default=10_000, help="in all (10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=NAMES, help="only this; repeatable")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    kinds = asked.kind or list(NAMES)
    sys.exit(1 if run_all(kinds, asked.cases, asked.seed, asked.first, asked.processes) else 0)


if __name__ == "__main__":
    main()
