"""Signals at a chosen change of a file, in a process forked for it.

Python tells of every operation that changes a file before it happens (PEP 578); the child sends
itself the signal at the n-th one below a folder. Nothing is left to luck.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from compress.commands.interruption import _Interrupter

# Events that change what is on the disk, and where their paths stand among the arguments.
_PATHS = {
    "os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.link": (0, 1),
    "os.symlink": (1,), "os.truncate": (0,), "shutil.rmtree": (0,), "compress.exchange": (0, 1),
}  # fmt: skip
_NOT_REACHED, _DONE_AFTER_SIGNAL, _FAILED = 0, 3, 4


def signalled(
    work: Callable[[], object], folder: Path, n: int, sent: signal.Signals, *, again: bool = False
) -> bool:
    """Run ``work`` in a forked process that gets a signal before its n-th change below a folder.

    With ``again`` it gets one before every later change too.

    Returns:
        Whether there was an n-th change.
    """
    # What earlier tests left must not be collected in the child: a session of ONNX Runtime would
    # wait there for its threads, which are the parent's.
    gc.freeze()
    child = os.fork()
    if child == 0:
        os._exit(_child(work, folder, (n + 1, sys.maxsize if again else n + 1), sent))
    gc.unfreeze()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == sent
        return True
    code = os.waitstatus_to_exitcode(status)
    assert code in (_NOT_REACHED, _DONE_AFTER_SIGNAL), f"the child ended with {code}"
    return code == _DONE_AFTER_SIGNAL


def _child(
    work: Callable[[], object], folder: Path, between: tuple[int, int], sent: signal.Signals
) -> int:
    changes, reached = 0, False

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal changes, reached
        if not _changes(event, arguments, str(folder)):
            return
        changes += 1
        if between[0] <= changes <= between[1]:
            reached = True
            os.kill(os.getpid(), sent)

    signal.signal(signal.SIGINT, _Interrupter())
    sys.addaudithook(watch)
    try:
        work()
    except (KeyboardInterrupt, SystemExit):
        pass
    except BaseException:
        traceback.print_exc()
        return _FAILED
    return _DONE_AFTER_SIGNAL if reached else _NOT_REACHED


def _changes(event: str, arguments: tuple[object, ...], folder: str) -> bool:
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return bool(writes) and str(path).startswith(folder)
    where = _PATHS.get(event, ())
    return any(os.fsdecode(os.fspath(str(arguments[i]))).startswith(folder) for i in where)
