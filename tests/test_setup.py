"""The set-up script, with a stand-in for Python that notes what it is asked for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from places import ROOT

STANDIN = """#!/bin/sh
printf '%s\\n' "$0 $*" >> "$LOG"
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin"
    cp "$STANDIN" "$3/bin/python"
fi
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup", "scripts/test", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "standin").write_text(STANDIN)
    (tmp_path / "standin").chmod(0o755)
    return tmp_path


def asked(checkout: Path, *words: str) -> list[str]:
    """Run ./scripts/test, and return the commands that it gave to Python."""
    log, python = checkout / "log", str(checkout / "standin")
    log.unlink(missing_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "COMPRESS_TORCH"}
    environment |= {"LOG": str(log), "STANDIN": python, "PYTHON": python}
    done = subprocess.run(
        [str(checkout / "scripts" / "test"), *words], env=environment, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return log.read_text().splitlines()


def test_the_pinned_versions_are_installed_once(checkout: Path) -> None:
    first = asked(checkout, "-k", "words")
    assert [line for line in first if line.endswith("-c constraints.txt torch")]
    assert first[-1].endswith("-k words")
    assert f"{checkout}/.venv/bin/python -m pytest" in first[-1]
    assert asked(checkout, "-k", "words") == first[-1:]


@pytest.mark.parametrize(("version", "wanted"), [("latest", "torch"), ("2.12.0", "torch==2.12.0")])
def test_another_torch_has_an_environment_of_its_own(
    checkout: Path, version: str, wanted: str
) -> None:
    asked(checkout)
    found = asked(checkout, "--torch", version, "-x")
    venv = f".venv-torch-{version}"
    installs = [line for line in found if " pip install " in line]
    assert len(installs) == 2
    assert all(line.startswith(f"{venv}/bin/python ") and wanted in line.split()
               for line in installs)  # fmt: skip
    pins = (checkout / venv / "constraints.txt").read_text()
    assert not re.search(r"^torch", pins, re.MULTILINE)
    assert "mkdocs" in pins
    assert f"{checkout}/{venv}/bin/python -m pytest" in found[-1]
    assert found[-1].endswith(" -x")
    assert len(asked(checkout)) == 1  # the pinned one stands as it was
