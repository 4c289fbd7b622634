"""Consoles of every kind, and numbers that are none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import DOCS
from workbench import SPEC, Workbench, command, paragraph

from compress.commands.output import fitting
from compress.commands.terminal import Terminal
from compress.report.text import MINUS, TIMES

SAMPLE = str(DOCS / "sample")
LONG = "n" * 300


def process(
    *words: str, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "compress.commands", *words], stdout=stdout, stderr=stderr,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, check=False,
    )  # fmt: skip


# --- Encodings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8", "utf-16"])
def test_output_in_every_encoding(encoding: str) -> None:
    done = process("report", SAMPLE, PYTHONIOENCODING=encoding)
    assert done.returncode == 1, done.stderr  # the sample breaks a limit
    shown = done.stdout.decode("utf-8" if encoding == "utf-8" else encoding)
    assert shown.startswith("Failed: 1 of 2 limits broken")
    if encoding == "ascii":
        assert "194.69 k > 27.72 k" in shown
        assert "-3.89 points" in shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_the_same_data_in_every_encoding(encoding: str) -> None:
    done = process("report", SAMPLE, "--json", PYTHONIOENCODING=encoding)
    shown = json.loads(done.stdout.decode(encoding))
    assert shown["result"] == json.loads((DOCS / "sample" / "report.json").read_text())["result"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_errors_in_every_encoding(encoding: str) -> None:
    done = process("report", "nö→.json", PYTHONIOENCODING=f"{encoding}:strict")
    assert done.returncode == 3
    assert b"There is no report at n" in done.stderr


def test_stand_ins_and_names_that_are_no_utf_8() -> None:
    text = f"{MINUS}1.12 → {TIMES}0.50 é"
    assert fitting(text, "ascii") == "-1.12 > x0.50 ?"
    assert fitting(text, "latin-1") == f"-1.12 > {TIMES}0.50 é"
    assert fitting(text, "utf-8") == text
    assert fitting(os.fsdecode(b"caf\xe9"), "utf-8") == r"caf\xe9"


def test_results_in_folders_that_are_no_utf_8(tmp_path: Path) -> None:
    places = [tmp_path / os.fsdecode(name) for name in (b"caf\xe9", b"caf\xe8")]
    for place in places:
        shutil.copytree(SAMPLE, place)
    results, out = [str(place) for place in places], str(tmp_path / os.fsdecode(b"\xe9"))
    done = command("report", *results, "--json", "--output", out)
    assert json.loads(done.stdout)["runs"][0]["name"].endswith(r"caf\xe9")
    assert {p.name for p in Path(out).iterdir()} == {"report.json", "report.md", "report.html"}
    written = json.loads((Path(out) / "report.json").read_text(encoding="utf-8"))
    assert written == json.loads(done.stdout)
    junit = tmp_path / os.fsdecode(b"\xe9.xml")
    shown = command("report", results[0], "--baseline", f"{results[1]}/report.json", "--junit",
                    str(junit))  # fmt: skip
    assert r"caf\xe8/report.json" in shown.stdout
    assert junit.read_text(encoding="utf-8")


def test_json_of_names_that_are_no_utf_8_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"caf\xe9")
    Terminal(as_json=True).show({"name": name}, [])
    assert json.loads(capsys.readouterr().out) == {"name": "caf\\xe9"}


# --- Streams that take nothing -----------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [("report", SAMPLE), ("report", SAMPLE, "--json"), ("--help",), ("run", "--help")]
)
def test_a_full_disk_behind_stdout(words: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = process(*words, stdout=full.fileno())
    assert done.returncode == 3
    assert done.stderr.decode().strip() == (
        "Error: The output cannot be printed: No space left on device; send it somewhere with "
        "space. What the command wrote into files is complete."
    )


def test_a_full_disk_behind_stderr() -> None:
    with open("/dev/full", "wb") as full:
        assert process("report", "missing", stderr=full.fileno()).returncode == 3
        assert process("rnu", stderr=full.fileno()).returncode == 2


@pytest.mark.parametrize("words", [("report", SAMPLE), ("--help",), ("run", "--help")])
def test_a_pipe_that_nobody_reads(words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = process(*words, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_closed_streams(bench: Workbench) -> None:
    words = f"run {bench.checkpoint} --model {SPEC} --data {bench.train} --rank conv2=4 --no-refit"
    words += " --no-latency"
    done = subprocess.run(
        f"{sys.executable} -m compress.commands {words} --output {bench.output()} >&- 2>&-",
        shell=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0
    assert bench.leftovers() == ["out"]


def test_the_codes_are_documented() -> None:
    page = (DOCS / "reference" / "cli.md").read_text()
    assert "| 141 |" in page


# --- Numbers and names that are none -----------------------------------------------------------


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "NaN", "1e999"])
@pytest.mark.parametrize(
    "words",
    [
        ("report", SAMPLE, "--max-drop"),
        ("report", SAMPLE, "--max-kl"),
        ("run", "w.pt", "--max-layer-relative-mse"),
        ("run", "w.pt", "--macs"),
        ("sweep", "w.pt", "--min-agreement"),
        ("verify", "out", "--max-drop"),
    ],
)
def test_numbers_that_are_not_finite(words: tuple[str, ...], value: str) -> None:
    assert f"'{value}' is not a finite number" in paragraph(command(*words, value), 2)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "key", ["max_drop", "max_layer_relative_mse", "min_agreement", "threshold", "target_drop"]
)
def test_files_with_numbers_that_are_not_finite(tmp_path: Path, key: str, value: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f"{key} = {value}\n")
    assert f"{key} = {value}" in paragraph(command("run", "w.pt", "--config", str(file)), 2)
    if key.startswith("m"):
        text = paragraph(command("report", SAMPLE, "--config", str(file)), 2)
        assert f"{key} = {value} is not a finite number" in text


def test_limits_in_a_file_that_are_no_numbers(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("max_drop = 'much'\n")
    text = paragraph(command("report", SAMPLE, "--config", str(file)), 2)
    assert "max_drop = 'much' is not a finite number" in text


@pytest.mark.parametrize("grid", ["nan", "1e-3,inf", "1e-3:inf:3", "nan:1:2"])
def test_grids_that_are_not_finite(grid: str) -> None:
    paragraph(command("sweep", "w.pt", "--thresholds", grid, "--output", "out"), 2)
    paragraph(command("sweep", "w.pt", "--macs", grid, "--output", "out"), 2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--threads", "100000"), "threads = 100000 is not a number of threads from 1 to 1024"),
        (("--threads", "0"), "threads = 0 is not a number of threads"),
        (("--workers", "100000"), "workers = 100000 is not a number of processes from 0 to 1024"),
        (("--workers", "-1"), "workers = -1 is not a number of processes"),
        (("--device", "meta"), "The device 'meta' cannot be used"),
    ],
)
@pytest.mark.parametrize("name", ["run", "plan", "inspect", "evaluate"])
def test_settings_that_no_machine_has(name: str, flags: tuple[str, ...], words: str) -> None:
    assert words in paragraph(command(name, "w.pt", *flags), 2)


@pytest.mark.parametrize(
    "words",
    [
        ("report", LONG),
        ("report", SAMPLE, "--baseline", LONG),
        ("report", SAMPLE, "--output", LONG),
        ("report", SAMPLE, "--junit", LONG),
        ("verify", LONG),
        ("apply", LONG),
        ("evaluate", LONG, "--test", "tensors:t.npz"),
        ("inspect", LONG, "--model", SPEC),
        ("inspect", "w.pt", "--model", f"{LONG}.py:net"),
        ("inspect", "w.pt", "--model", SPEC, "--data", f"imagefolder:{LONG}"),
        ("inspect", "w.pt", "--config", LONG),
        ("plan", "w.pt", "--output", LONG),
        ("plan", "w.pt", "--calibration", LONG),
        ("run", "w.pt", "--output", LONG),
    ],
)
def test_names_of_300_letters(words: tuple[str, ...]) -> None:
    result = command(*words)
    assert result.exit_code in (2, 3)
    assert "unexpected" not in result.stderr
