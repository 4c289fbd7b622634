"""Ctrl-C, SIGTERM and a closed terminal, at moments chosen by the import or the file they hit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial

import pytest

from compress.commands import interruption

SENT = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
# Starts the command line, and sends a signal at the n-th import from there.
DURING_IMPORTS = """
import os, sys
import compress.commands.interruption
left, sent = int(sys.argv.pop(1)), int(sys.argv.pop(1))
def watch(event, arguments):
    global left
    if event == "import":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), sent)
sys.addaudithook(watch)
compress.commands.main()
"""


@pytest.mark.parametrize("sent", SENT, ids=lambda s: s.name)
@pytest.mark.parametrize("n", [1, 2, 10, 60])
def test_a_signal_while_the_command_line_is_imported(n: int, sent: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DURING_IMPORTS, str(n), str(int(sent)), "--help"],
        capture_output=True, text=True, check=False,
        preexec_fn=partial(signal.signal, sent, signal.SIG_DFL),
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert done.stderr == "Interrupted; nothing was left behind.\n"


def test_signals_that_are_ignored_stay_ignored() -> None:
    """As ``nohup`` and jobs in the background have it."""
    done = subprocess.run(
        [sys.executable, "-c", DURING_IMPORTS, "10", str(int(signal.SIGHUP)), "--help"],
        capture_output=True, text=True, check=False,
        preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Usage: compress" in done.stdout


def test_no_terminal_is_left_to_write_to() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", DURING_IMPORTS, "10", str(int(signal.SIGHUP)), "--help"],
        stdout=subprocess.PIPE, stderr=write, check=False,
        preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    os.close(write)
    assert done.returncode == 130


def test_a_second_signal_waits_and_a_swallowed_one_does_not_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [100.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: clock[0])
    handler = interruption._Interrupter()
    with pytest.raises(KeyboardInterrupt):
        handler(signal.SIGINT, None)
    for later in (100.0, 101.0, 109.9):
        clock[0] = later
        handler(signal.SIGINT, None)  # the first one's clean-up goes on
    clock[0] = 110.1
    with pytest.raises(KeyboardInterrupt):
        handler(signal.SIGINT, None)
