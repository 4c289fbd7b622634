"""The examples of the pages run as they stand, and the example script works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

PAGES = (
    "overparam", "flat", "hypernet", "from-overparam", "from-reparam-module", "from-hyperlight",
)  # fmt: skip
EXAMPLES = [
    pytest.param(code, id=f"{page}-{index}")
    for page in PAGES
    for index, code in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.S)
    )
]


def test_every_page_has_an_example() -> None:
    assert {str(p.id).rpartition("-")[0] for p in EXAMPLES} == set(PAGES)


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code: str) -> None:
    assert "assert" in code
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_the_digits_example_runs(tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "spectra.svg"
    command = [sys.executable, str(ROOT / "scripts" / "overparam_digits.py")]
    command += ["--seeds", "1", "--epochs", "0", "--plot", str(plot)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line[:2] == "| "]
    assert rows == [
        "network", "---", "plain", "depth 2", "depth 4", "depth 8",
        "within 0.5 points of its own", "---", "plain", "depth 2", "depth 4", "depth 8",
        "at 95% of the validation images", "---", "plain", "depth 2", "depth 4", "depth 8",
    ]  # fmt: skip
    assert plot.read_text().count("<polyline") == 16
