"""The values that single settings may have; nothing here knows of the others."""

from __future__ import annotations

import math

from compress.linalg.schemes import SCHEME_NAMES
from compress.plan import NARROWER

METRICS = ("loss", "mse")
TORCH, COMPILE = "torch", "compile"
EXPORTS = ("onnx", "pt2", "aoti")
RUNTIMES = (TORCH, COMPILE, "onnxruntime", "openvino")
TASK_NAMES = (
    "classification", "multilabel", "regression", "segmentation", "detection", "restoration",
)  # fmt: skip
LARGEST_SEED = (1 << 32) - 1
# More threads or processes than any machine that this runs on has cores: systems refuse to start
# them, and not all libraries survive that.
MOST_THREADS = 1024
MOST_WORKERS = 1024


def positive(value: int | None) -> str | None:
    """Say that a number is below one, or None where it is not."""
    return None if value is None or value >= 1 else "is not a positive number"


def runtime(value: str) -> str | None:
    """Say that there is no such runtime."""
    return None if value in RUNTIMES else f"is not one of {', '.join(RUNTIMES)}"


def export(value: str) -> str | None:
    """Say that there is no such kind of file."""
    inside = value in ("", *EXPORTS)
    return None if inside else f"is not one of {', '.join(EXPORTS)}"


def size(value: int | tuple[int, ...] | None) -> str | None:
    """Say what is wrong with a size: one number, or a height and a width."""
    if not isinstance(value, tuple):
        return positive(value)
    if len(value) != 2:
        return f"has {len(value)} numbers; give one, or a height and a width"
    return None if min(value) >= 1 else "holds a number that is not positive"


def threads(value: int | None) -> str | None:
    """Say that this is no number of threads."""
    inside = value is None or 1 <= value <= MOST_THREADS
    return None if inside else f"is not a number of threads from 1 to {MOST_THREADS}"


def workers(value: int) -> str | None:
    """Say that this is no number of processes."""
    inside = 0 <= value <= MOST_WORKERS
    return None if inside else f"is not a number of processes from 0 to {MOST_WORKERS}"


def points(value: float | None) -> str | None:
    """Say that this is no number of percentage points."""
    inside = value is None or 0 <= value <= 100
    return None if inside else "is not a number of points from 0 to 100"


def minutes(value: float | None) -> str | None:
    """Say that this is no time to spend."""
    return None if value is None or 0 < value < math.inf else "is not a number of minutes above 0"


def share(value: float | None) -> str | None:
    """Say that a share is outside [0, 1]."""
    return None if value is None or 0 <= value <= 1 else "is outside [0, 1]"


def from_zero(value: float | None) -> str | None:
    """Say that a number is below zero."""
    return None if value is None or value >= 0 else "is not a number from 0"


def seed(value: int) -> str | None:
    """Say that this is no seed."""
    return None if 0 <= value <= LARGEST_SEED else f"is outside 0 to {LARGEST_SEED}"


# What may be done to layers: each scheme to one, and channels taken out of several.
WAYS = (*SCHEME_NAMES, *NARROWER)
