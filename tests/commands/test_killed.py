"""Commands killed or interrupted at the changes they make to files, by injection and never by luck.

The test suite takes every twelfth change, and with COMPRESS_EVERY_CHANGE=1 all of them. What
happens inside a single step of writing is in `tests/test_files.py`, change by change.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from interruptions import signalled
from workbench import SPEC, Workbench, command

STRIDE = 1 if os.environ.get("COMPRESS_EVERY_CHANGE") else 12
EARLIER, LATER = ("--rank", "conv2=2", "--no-refit"), ("--rank", "conv2=3", "--no-refit")
Work = Callable[[Workbench], Result]


def run(bench: Workbench, *given: str) -> Result:
    return bench.run(*(given or LATER), "--force")


def apply(bench: Workbench) -> Result:
    return command(
        "apply", str(bench.folder / "plan.json"), "--checkpoint", bench.checkpoint, "--model", SPEC,
        "--data", bench.train, "--test", bench.test, "--no-refit", "--output", str(bench.output()),
        "--force",
    )  # fmt: skip


def report(bench: Workbench) -> Result:
    result = str(bench.folder / "result")
    return command("report", result, "--output", str(bench.output()), "--force")


def sweep(bench: Workbench, *given: str) -> Result:
    return command(
        "sweep", bench.checkpoint, "--model", SPEC, "--data", bench.train, "--no-refit",
        "--thresholds", "0.3,0.01", "--pick", "macs<=1", "--output", str(bench.output()),
        *(given or ("--force",)),
    )  # fmt: skip


def prepared(bench: Workbench, work: Work) -> list[str]:
    """What stands before; returns the names beside the output."""
    if work is apply:
        plan = bench.folder / "plan.json"
        made = command("plan", bench.checkpoint, "--model", SPEC, "--data", bench.train,
                       "--rank", "conv2=3", "--output", str(plan))  # fmt: skip
        assert made.exit_code == 0, made.stderr
    if work is report:
        assert bench.run(*EARLIER, output=str(bench.folder / "result")).exit_code == 0
    earlier = {run: run, apply: run, report: report, sweep: sweep}[work]
    done = earlier(bench, *EARLIER) if earlier is run else earlier(bench)
    assert done.exit_code == 0, done.stderr
    return sorted({*bench.leftovers(), "out"})


def contents(folder: Path) -> dict[str, bytes]:
    """What must be equal between runs: not what was timed, nor hidden files."""
    found = {}
    for file in sorted(folder.rglob("*")) if folder.is_dir() else []:
        name = file.relative_to(folder).as_posix()
        if file.is_file() and not any(part.startswith(".") for part in Path(name).parts):
            timed = name.startswith("sweep.") or file.name.startswith(("report.", "runtime."))
            # Only whether --force was given may differ between a sweep and its resumption.
            text = file.read_bytes().replace(b"\nforce = true\n", b"\nforce = false\n")
            found[name] = b"" if timed else text
    return found


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
@pytest.mark.parametrize("work", [run, apply, report, sweep], ids=lambda w: w.__name__)
def test_the_earlier_or_the_new_one_stands_and_the_next_start_clears_up(
    bench: Workbench, work: Work, sent: signal.Signals
) -> None:
    beside = prepared(bench, work)
    out = bench.output()
    before = contents(out)
    saved = bench.folder.parent / f"{bench.folder.name}-saved"
    shutil.copytree(bench.folder, saved)
    assert work(bench).exit_code == 0
    after = contents(out)
    n, reached = 0, True
    while reached:
        shutil.rmtree(bench.folder)
        shutil.copytree(saved, bench.folder)
        reached = signalled(lambda: work(bench), bench.folder, n, sent)
        if out.is_dir() and work is not sweep:
            assert contents(out) in (before, after), n
        if sent == signal.SIGINT:
            assert bench.leftovers() == beside, n
        # A sweep is started over in its folder, and goes on there.
        again = sweep(bench, "--resume") if work is sweep and _is_new(out) else work(bench)
        assert again.exit_code == 0, (n, again.stderr)
        assert contents(out) == after, n
        assert bench.leftovers() == beside, n
        hidden = [p for p in bench.folder.rglob(".*") if p.name != ".cache"]
        assert hidden == [], n
        n += STRIDE
    assert n > STRIDE
    shutil.rmtree(saved)


def _is_new(folder: Path) -> bool:
    """Whether a sweep that was started anew has left finished points to go on from."""
    points = folder / "sweep.points"
    return points.is_dir() and any(points.glob("*.json"))


def test_a_sweep_killed_anywhere_repeats_no_finished_point(bench: Workbench) -> None:
    fresh = sweep(bench, "--json")
    assert fresh.exit_code == 0, fresh.stderr
    whole = contents(bench.output())
    n, reached = 0, True
    while reached:
        shutil.rmtree(bench.output())
        reached = signalled(lambda: sweep(bench, "--quiet"), bench.folder, n, signal.SIGKILL)
        points = bench.output() / "sweep.points"
        finished = {p.name: p.stat().st_mtime_ns for p in points.glob("[!.]*.json")}
        done = sweep(bench, "--resume")
        assert done.exit_code == 0, (n, done.stderr)
        kept = [row for row in done.stdout.splitlines() if row.split()[-1:] == ["kept"]]
        assert len(kept) == len(finished), n
        assert contents(bench.output()) == whole, n
        assert {name: (points / name).stat().st_mtime_ns for name in finished} == finished, n
        n += STRIDE
    assert n > STRIDE
    assert json.loads(fresh.stdout)
