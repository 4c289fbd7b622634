"""Every error that this package raises on purpose.

::

    CompressError                 exit code
    ├── GateError                 1   a verification gate failed; the report is written, no model is
    ├── UsageError                2   a flag, configuration or plan that cannot be honoured
    │   ├── ConfigError           2   an unknown key, a value out of range, rules that contradict
    │   ├── BudgetError           2   a budget that no plan reaches; names the smallest reachable
    │   └── PlanError             2   a plan that does not fit the model it is applied to
    └── InputError                3   a file, model or dataset that cannot be used
        ├── CheckpointError       3   unreadable, truncated, code-carrying or wrong checkpoint
        ├── ModelError            3   a model spec that builds nothing, a forward that fails
        ├── DataError             3   an empty, corrupt or mislabelled dataset
        ├── CalibrationError      3   NaN or infinite activations, statistics that do not fit
        └── ArtefactError         3   a tampered, truncated or newer result; an unwritable output

    UnsupportedLayer   (ValueError) a layer or geometry that maths cannot represent exactly

A message is one paragraph: what is wrong, where (file, key, layer), what to do.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable

_LONGEST_COMPARED, _MOST_COMPARED = 100, 20_000


class CompressError(Exception):
    """Root of all errors raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 3


class GateError(CompressError):
    """A verification gate failed."""

    exit_code = 1


class UsageError(CompressError):
    """A request that cannot be honoured as written."""

    exit_code = 2


class ConfigError(UsageError):
    """An unknown configuration key, a value out of range or rules that contradict each other."""


class BudgetError(UsageError):
    """A budget that no plan reaches; the message names the smallest reachable one."""


class PlanError(UsageError):
    """A plan that does not fit the model it is applied to."""


class InputError(CompressError):
    """A file, model or dataset that cannot be used."""


class CheckpointError(InputError):
    """A checkpoint that cannot be read or does not belong to the model."""


class ModelError(InputError):
    """A model spec that builds nothing, or a model whose forward fails."""


class DataError(InputError):
    """A dataset that is empty, corrupt or labelled out of range."""


class CalibrationError(InputError):
    """Activations that are not finite, or stored statistics that do not fit."""


class ArtefactError(InputError):
    """A result that cannot be read, or an output that cannot be written."""


class UnsupportedLayer(ValueError):  # noqa: N818 - names the thing, as torch's own errors do
    """A layer or geometry that an operation cannot represent exactly; the message is the reason."""


def near_matches(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'a' or 'b'?"`` for the known names nearest to ``name``, or ``""``."""
    # Comparing takes time that grows with the square of a name's length.
    if len(name) > _LONGEST_COMPARED:
        return ""
    some = [k for k in itertools.islice(known, _MOST_COMPARED) if len(k) <= _LONGEST_COMPARED]
    close = difflib.get_close_matches(name, some, n=3, cutoff=0.5)
    if not close:
        return ""
    return f" Did you mean {' or '.join(repr(c) for c in close)}?"


def one_line(error: BaseException) -> str:
    """Return what an exception says on one line without a full stop, or else its type."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
