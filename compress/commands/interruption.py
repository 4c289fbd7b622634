"""What Ctrl-C and its like do: one of them ends the command, and the others wait for its clean-up.

Nothing but the standard library's smallest modules is imported here: a signal may arrive while the
rest is still being imported.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
# A command still there so long after a signal is not cleaning up: something swallowed it.
_PATIENCE = 10.0
# A job that CI ends, or whose terminal is closed, cleans up as on Ctrl-C: the refit may have
# gigabytes in a temporary folder.
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """Let signals interrupt the block once, and end the program with one line instead of a trace.

    Signals that whoever started the program wants ignored (``nohup``, a job in the background)
    stay ignored.
    """
    _install(_Interrupter())
    try:
        yield
    except KeyboardInterrupt:
        say_interrupted()
        sys.exit(INTERRUPTED)
    finally:
        # What is left is Python's own end, where a signal would only cause a traceback.
        _install(signal.SIG_IGN)


class _Interrupter:
    """A signal handler that raises `KeyboardInterrupt`, and then leaves time to clean up."""

    def __init__(self) -> None:
        self.last: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        now = time.monotonic()
        if self.last is None or now - self.last > _PATIENCE:
            self.last = now
            raise KeyboardInterrupt


def _install(handler: _Interrupter | signal.Handlers) -> None:
    for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def say_interrupted() -> None:
    """Print the one line on stderr, as far as there still is one."""
    try:
        sys.stderr.write("Interrupted; nothing was left behind.\n")
        sys.stderr.flush()
    except OSError:
        sys.stderr = None  # the terminal is gone, and Python would try once more at its end
