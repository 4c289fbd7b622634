"""The command line: ``compress run``, ``inspect``, ``plan``, ... as one click group.

Nothing here imports torch before a command needs it, so that ``compress --help`` is quick.
"""

from __future__ import annotations

import signal
import sys
import warnings

from compress.commands.apply import apply
from compress.commands.demo import demo
from compress.commands.evaluate import evaluate
from compress.commands.group import cli
from compress.commands.inspect import inspect
from compress.commands.plan import plan
from compress.commands.report import report
from compress.commands.run import run
from compress.commands.sweep import sweep
from compress.commands.verify import verify

for command in (run, inspect, plan, apply, sweep, report, verify, evaluate, demo):
    cli.add_command(command)

__all__ = ["cli", "main"]


def main() -> None:
    """Run the command line and exit with its code."""
    # A job that CI ends cleans up as on Ctrl-C: the refit may have gigabytes in a temporary folder.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if "--debug" not in sys.argv and not sys.warnoptions:
        # What torch and a user's forward warn of would stand before an error's one paragraph.
        warnings.simplefilter("ignore")
    cli.main(prog_name="compress")
