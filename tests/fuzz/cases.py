"""Running one case: what a reader makes of a damaged file, and what counts as a failure."""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from fuzz.kinds import KINDS, Kind

from compress.commands.group import UNEXPECTED, cli
from compress.errors import CompressError

SECONDS = 20
# What a case may take beyond what the process has, whatever the file says: limits of the package
# for small files come to less.
MEMORY = 1 << 30
# A case in this many also goes through the command line.
COMMAND_LINE = 25


@dataclass(frozen=True)
class Failure:
    """A case that ended in anything but a result or an error of this package.

    Attributes:
        kind: The kind of file.
        seed: The seed of the whole run.
        number: Which case of it.
        what: ``"exception"``, ``"hang"``, ``"memory"``, ``"exit 70"``, ``"terminal"`` or
            ``"crash"``.
        detail: What happened, on one line.
    """

    kind: str
    seed: int
    number: int
    what: str
    detail: str

    def __str__(self) -> str:
        again = f"scripts/fuzz 1 --kind {self.kind} --seed {self.seed} --first {self.number}"
        return f"{self.kind} #{self.number}: {self.what}: {self.detail}\n    again: {again}"

    def plain(self) -> dict[str, object]:
        """The same as JSON data."""
        return asdict(self)


class Hang(BaseException):
    """A case took too long."""


def case_data(kind: Kind, seed: int, number: int) -> bytes:
    """Return the file of one case: the same for the same seed and number."""
    return kind.case(random.Random(f"{kind.name} {seed} {number}"))


def run_case(kind: Kind, seed: int, number: int, bench: Path) -> Failure | str:
    """Read one damaged file.

    Args:
        kind: The kind of file.
        seed: The seed of the whole run.
        number: Which case of it.
        bench: A folder with good inputs, for the command line.

    Returns:
        A failure, else ``"fine"`` or ``"refused"``.
    """
    data = case_data(kind, seed, number)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"case{kind.suffix}")
        path.write_bytes(data)

        def fails(what: str, detail: str) -> Failure:
            return Failure(kind.name, seed, number, what, detail[:400])

        if kind.arguments is not None and number % COMMAND_LINE == 0:
            arguments = kind.arguments(path, bench)
            outcome = _watched(lambda: _command(arguments))
        else:
            outcome = _watched(lambda: _library(kind, path))
    return outcome if isinstance(outcome, str) else fails(*outcome)


Outcome = str | tuple[str, str]


def _library(kind: Kind, path: Path) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            kind.read(path)
    except CompressError as error:
        return _out_of_memory(error) or "refused"
    except Exception as error:
        return "exception", _where(error)
    return _hostile(out.getvalue()) or "fine"


def _command(arguments: list[str]) -> Outcome:
    from click.testing import CliRunner

    found = CliRunner().invoke(cli, arguments)
    if found.exit_code == UNEXPECTED:
        return "exit 70", f"{' '.join(arguments[:1])}: {found.stderr.strip()}"
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        return "exception", _where(found.exception)
    return _hostile(found.output) or ("fine" if found.exit_code == 0 else "refused")


def _hostile(text: str) -> Outcome | None:
    """Whether a terminal would obey something in a text instead of showing it."""
    bad = {c for c in text if (ord(c) < 32 and c not in "\n\t\r") or 127 <= ord(c) < 160}
    bad |= {c for c in text if "\u202a" <= c <= "\u202e" or "\ud800" <= c <= "\udfff"}
    return ("terminal", f"printed {sorted(bad)!r}") if bad else None


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f"{os.sep}compress{os.sep}" in f.filename] or list(frames)
    text = " ".join(str(error).split())[:150]
    return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}: {text}"


def _out_of_memory(error: BaseException | None) -> Outcome | None:
    """Whether an error only came about because the memory of this process is bounded."""
    first = error
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or "llocate memory" in text or "nable to alloc" in text:
            return "memory", _where(error) + f" under {type(first).__name__}"
        error = error.__cause__ or error.__context__
    return None


def _watched(run: Callable[[], Outcome]) -> Outcome:
    """Run with an alarm, and look at how much memory it took at its peak."""
    before = _reset_peak()
    try:
        with _alarm():
            outcome = run()
    except Hang as error:
        return "hang", f"over {SECONDS} s, {_where(error)}"
    taken = _peak() - before
    if taken > MEMORY and isinstance(outcome, str):
        return "memory", f"{taken >> 20} MiB at its peak"
    return outcome


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(_: int, __: FrameType | None) -> None:
        raise Hang

    earlier = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def bound_memory() -> None:
    """Let this process take `MEMORY` more than it has, and no more."""
    status = Path("/proc/self/status").read_text()
    size = int(status.split("VmSize:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * MEMORY, size + 2 * MEMORY))


def _reset_peak() -> int:
    """Start counting the peak of resident memory anew, where the system can; return what it is."""
    if sys.platform != "linux":
        return 0
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def flipped(kind: Kind, seed: int) -> bytes:
    """Return a valid file with one bit flipped in what only a digest can vouch for."""
    rng = random.Random(f"flip {kind.name} {seed}")
    data = bytearray(rng.choice(kind.valid()))
    assert kind.payload is not None
    data[rng.choice(kind.payload(bytes(data)))] ^= 1 << rng.randrange(8)
    return bytes(data)


def all_kinds() -> list[str]:
    """Names of all kinds."""
    return list(KINDS)
