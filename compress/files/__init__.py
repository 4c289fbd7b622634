"""Writing results so that a reader never meets half of one, and nobody loses a file."""

from compress.files.atomic import atomic_folder, atomic_update, sha256_file, write_atomically
from compress.files.outputs import (
    MODEL_FILE,
    REPORT,
    RESULT,
    SWEEP,
    OutputKind,
    check_apart,
    check_output,
    kind_of_folder,
)
from compress.files.places import check_file, check_room, check_writable

__all__ = [
    "MODEL_FILE",
    "REPORT",
    "RESULT",
    "SWEEP",
    "OutputKind",
    "atomic_folder",
    "atomic_update",
    "check_apart",
    "check_file",
    "check_output",
    "check_room",
    "check_writable",
    "kind_of_folder",
    "sha256_file",
    "write_atomically",
]
