"""What was timed of a model: a small file beside the weights, which nothing but speed depends on.

Times differ from run to run. They stand apart from the model, so that equal inputs give equal bytes
of ``model.safetensors``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from compress.files import RUNTIME_FILE, write_atomically
from compress.running.memory_format import MEMORY_FORMATS
from compress.untrusted import Unreadable, read_json

FORMAT = 1


@dataclass(frozen=True)
class Runtime:
    """How a model is run.

    Attributes:
        memory_format: The one that it was faster in: ``"contiguous"`` or ``"channels_last"``.
        problem: What is wrong with the file, where something is.
    """

    memory_format: str = "contiguous"
    problem: str = ""


def write_runtime(folder: str | Path, runtime: Runtime) -> None:
    """Write how a model is run into its result folder.

    Raises:
        ArtefactError: It cannot be written.
    """
    record = {"format": FORMAT, "memory_format": runtime.memory_format}
    write_atomically(Path(folder) / RUNTIME_FILE, json.dumps(record, indent=1) + "\n")


def read_runtime(path: str | Path) -> Runtime:
    """Read how a model is run, from the file beside its weights.

    Args:
        path: A result folder, or the model file in it.

    Returns:
        What the file says. Without one, or where it is damaged, a model is run contiguous, which
        every model can be.
    """
    path = Path(path)
    file = path / RUNTIME_FILE if path.is_dir() else path.with_name(RUNTIME_FILE)
    try:
        raw = read_json(file)
    except FileNotFoundError:
        return Runtime()
    except (OSError, Unreadable) as error:
        return Runtime(problem=_problem(file, str(error)))
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        return Runtime(problem=_problem(file, f"it has no format {FORMAT}"))
    if raw.get("memory_format") not in list(MEMORY_FORMATS):  # a list may be asked for anything
        return Runtime(problem=_problem(file, f"its memory_format is none of {_KNOWN}"))
    return Runtime(str(raw["memory_format"]))


_KNOWN = ", ".join(MEMORY_FORMATS)


def _problem(file: Path, reason: str) -> str:
    return (
        f"{file} cannot be used ({reason}), and the model is run contiguous, which may be slower; "
        "delete the file, or run `compress run` again."
    )
