"""What is known of the outputs at the start is said at the start, by every command that writes."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import Result
from workbench import SPEC, Workbench, command, paragraph

LATIN_1 = os.fsdecode(b"caf\xe9")
RANKS = ("--rank", "conv2=4")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    # The place that others import from comes last: they must not take the replacement for good.
    for place in ("pipeline.run.load_network", "sweep.run.load_network",
                  "pipeline.inspect.load_network", "pipeline.verify.load_model",
                  "pipeline.evaluate.load_model", "inputs.load.load_model"):  # fmt: skip
        monkeypatch.setattr(f"compress.{place}", forbidden)


def planned(bench: Workbench) -> str:
    file = bench.folder / "plan.json"
    done = command("plan", bench.checkpoint, "--model", SPEC, "--data", bench.train, *RANKS,
                   "--output", str(file))  # fmt: skip
    assert done.exit_code == 0, done.stderr
    return str(file)


def started(bench: Workbench, name: str, *flags: str, output: str = "out") -> Result:
    """Run a command that writes, with its output in the bench's folder."""
    place = str(bench.folder / output)
    given = [bench.checkpoint, "--model", SPEC, "--data", bench.train, "--output", place, *flags]
    if name == "run":
        return command("run", *given, *RANKS)
    if name == "sweep":
        return command("sweep", *given, "--macs", "0.8")
    return command("plan", *given, *RANKS)


WRITERS = ("run", "sweep", "plan")
# From what a name is to what the error must say of it.
NAMES = {
    "240 letters": ("n" * 240, "has 240 bytes"),
    "300 letters": ("n" * 300, "has 300 bytes"),
    "a long parent": ("n" * 300 + "/out", "has 300 bytes"),
    "a long path": ("/".join(["n" * 200] * 20) + "/out", "bytes, and at most"),
    "bytes": ("ü" * 130, "has 260 bytes"),
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", NAMES)
def test_names_too_long_to_be_written(bench: Workbench, name: str, kind: str) -> None:
    output, words = NAMES[kind]
    assert words in paragraph(started(bench, name, output=output), 3)
    assert bench.leftovers() == []


def test_the_longest_name_that_is_accepted_can_be_written(bench: Workbench) -> None:
    output = "n" * 237
    for name in WRITERS:
        assert started(bench, name, output=output).exit_code == 0
        path = bench.folder / output
        assert path.exists()
        assert bench.leftovers() == [output]
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class File(NamedTuple):
    flag: str
    what: str


FILES = (File("--calibration", "calibration"), File("--latency-table", "latency table"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.what)
def test_files_are_checked_before_the_work(bench: Workbench, name: str, file: File) -> None:
    def start(path: Path) -> Result:
        return started(bench, name, file.flag, str(path))

    missing = bench.folder / "missing" / "file"
    assert f"there is no folder {missing.parent}" in paragraph(start(missing), 3)
    assert "has 240 bytes" in paragraph(start(bench.folder / ("n" * 240)), 3)
    if file.flag != "--calibration":  # a calibration that is there is read
        assert f"The {file.what} {bench.folder} is a folder" in paragraph(start(bench.folder), 3)
    assert bench.leftovers() == []


def refusing(folder: Path) -> Callable[..., Any]:
    """An ``open`` that writes nothing into a folder."""
    real = open

    def refuse(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if "x" in mode and Path(path).parent == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, mode, *rest, **more)

    return refuse


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("what", ["--output", "--calibration", "--latency-table"])
def test_folders_that_may_not_be_written_into(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    folder = bench.folder / "locked"
    folder.mkdir()
    monkeypatch.setattr("builtins.open", refusing(folder))
    if what == "--output":
        result = started(bench, name, output="locked/out")
    else:
        result = started(bench, name, what, str(folder / "file"))
    assert "cannot be written: Permission denied" in paragraph(result, 3)
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", WRITERS)
def test_permissions_of_the_system_itself(bench: Workbench, name: str) -> None:
    folder = bench.folder / "locked"
    folder.mkdir(mode=0o555)
    assert "Permission denied" in paragraph(started(bench, name, output="locked/out"), 3)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ["run", "sweep"])
def test_outputs_below_what_is_no_folder(bench: Workbench, name: str) -> None:
    for output in ("weights.safetensors/out", "/proc/out"):
        text = paragraph(started(bench, name, output=output), 3)
        assert "cannot be written" in text
    assert bench.leftovers() == []


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", WRITERS)
def test_paths_that_are_no_utf_8_are_refused(bench: Workbench, name: str) -> None:
    for flags in (("--output", LATIN_1), ("--data", f"imagefolder:{LATIN_1}"),
                  ("--keep", LATIN_1), ("--rank", f"{LATIN_1}=3")):  # fmt: skip
        text = paragraph(started(bench, name, *flags), 2)
        assert r"caf\xe9" in text
        assert "is not UTF-8" in text
    assert bench.leftovers() == []


def test_apply_checks_its_outputs_too(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(bench)
    apply = (
        "apply",
        plan,
        "--checkpoint",
        bench.checkpoint,
        "--model",
        SPEC,
        "--data",
        bench.train,
    )

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("compress.pipeline.run.load_network", forbidden)
    long = str(bench.folder / ("n" * 240))
    assert "has 240 bytes" in paragraph(command(*apply, "--output", long), 3)
    out = ("--output", str(bench.output()))
    missing = bench.folder / "missing" / "file"
    text = paragraph(command(*apply, *out, "--calibration", str(missing)), 3)
    assert f"there is no folder {missing.parent}" in text
    assert bench.leftovers() == ["plan.json"]


def test_reports_check_their_outputs_before_they_measure(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench.run(*RANKS).exit_code == 0

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("compress.pipeline.verify.verify_result", forbidden)
    measure = ("report", "--before", bench.checkpoint, "--after", str(bench.output()), "--model",
               SPEC, "--test", bench.test)  # fmt: skip
    missing = bench.folder / "missing" / "r.xml"
    cases = {
        ("--junit", str(missing)): f"there is no folder {missing.parent}",
        ("--junit", str(bench.folder / ("n" * 240))): "has 240 bytes",
        ("--junit", str(bench.folder)): "is a folder",
        ("--junit", bench.checkpoint): "was not written by compress report",
        ("--output", str(bench.folder / ("n" * 300))): "has 300 bytes",
        ("--output", str(bench.output())): "already holds a report",
        ("--output", f"{bench.checkpoint}/out"): "cannot be written",
    }
    for flags, words in cases.items():
        assert words in paragraph(command(*measure, *flags), 3)
    assert bench.leftovers() == ["out"]


# --- Full disks --------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ["run", "sweep"])
def test_a_disk_that_is_full_from_the_start(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    usage = shutil.disk_usage(bench.folder)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    text = paragraph(started(bench, name), 3)
    assert "and its disk has 1,000 free; free some space" in text
    assert bench.leftovers() == []


@pytest.mark.parametrize("what", ["--output", "--calibration", "--latency-table", "sweep"])
def test_a_disk_that_fills_up_leaves_what_stood_there(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    name = "sweep" if what == "sweep" else "run"
    assert started(bench, name).exit_code == 0
    before = {p: p.read_bytes() for p in bench.output().rglob("*") if p.is_file()}
    real = os.fsync

    def full(descriptor: int) -> None:
        written = os.readlink(f"/proc/self/fd/{descriptor}")
        if what in ("--output", "sweep") or "file.json" in written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr("os.fsync", full)
    flags = [] if what in ("--output", "sweep") else [what, str(bench.folder / "file.json")]
    if what == "--latency-table":
        # One layer and one scheme to time: the table is written all the same.
        flags += ["--latency", "0.99", "--schemes", "output", "--keep", "conv1", "--keep", "head"]
    given = [bench.checkpoint, "--model", SPEC, "--data", bench.train, "--force", "--output",
             str(bench.output()), *flags]  # fmt: skip
    if what == "--calibration":
        given += RANKS
    if what == "--output":
        given += ["--rank", "conv2=2"]
    given += ["--macs", "0.7"] if what == "sweep" else []
    text = paragraph(command(name, *given), 3)
    assert "No space left on device" in text
    assert text.count("free some space") == 1
    after = {p: p.read_bytes() for p in bench.output().rglob("*") if p.is_file()}
    assert {p: data for p, data in after.items() if p in before} == before
    assert bench.leftovers() == ["out"]


@pytest.mark.parametrize("limit", [20_000])
def test_files_that_may_not_grow(bench: Workbench, limit: int) -> None:
    """A process of its own whose files stop at a size, as near to a full disk as a test can get."""
    words = ["run", bench.checkpoint, "--model", SPEC, "--data", bench.train, *RANKS, "--no-refit",
             "--no-latency", "--output", str(bench.output())]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "compress.commands", *words], capture_output=True, text=True,
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)), check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "File too large; free some space" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    # Only the report was too large.
    assert bench.leftovers() == ["out.unfinished"]
    kept = {p.name for p in bench.output("out.unfinished").iterdir()}
    assert kept >= {"model.safetensors", "plan.json", "config.toml", "calibration.safetensors"}


def test_a_copy_that_does_not_fit_is_an_error(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report goes into a copy of its folder; where that cannot be linked, it is copied."""
    assert bench.run(*RANKS).exit_code == 0

    def refuse(_: Any, target: Any, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr("shutil.copy2", refuse)
    result = command("report", str(bench.output()), "--output", str(bench.output()), "--force")
    text = paragraph(result, 3)
    assert "No space left on device" in text
    assert bench.leftovers() == ["out"]


def test_no_temporary_folder(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    text = paragraph(bench.run(*RANKS), 3)
    assert "No usable temporary directory found; set TMPDIR" in text
    assert bench.leftovers() == []
