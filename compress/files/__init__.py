"""Writing results so that a reader meets neither half of one nor a damaged one."""

from compress.files.atomic import atomic_folder, atomic_update, sha256_file, write_atomically
from compress.files.outputs import (
    CALIBRATION_FILE,
    EXPORT_FILES,
    MODEL_FILE,
    RECOVERY_FILE,
    REPORT,
    RESULT,
    RUNTIME_FILE,
    SWEEP,
    UNFINISHED,
    OutputKind,
    check_apart,
    check_output,
    kind_of_folder,
)
from compress.files.places import check_file, check_room, check_writable
from compress.files.sealed import (
    SEAL_KEY,
    BrokenSeal,
    check_tensors,
    sealed_record,
    sealed_tensors,
    unsealed_record,
)

__all__ = [
    "CALIBRATION_FILE",
    "EXPORT_FILES",
    "MODEL_FILE",
    "RECOVERY_FILE",
    "REPORT",
    "RESULT",
    "RUNTIME_FILE",
    "SEAL_KEY",
    "SWEEP",
    "UNFINISHED",
    "BrokenSeal",
    "OutputKind",
    "atomic_folder",
    "atomic_update",
    "check_apart",
    "check_file",
    "check_output",
    "check_room",
    "check_tensors",
    "check_writable",
    "kind_of_folder",
    "sealed_record",
    "sealed_tensors",
    "sha256_file",
    "unsealed_record",
    "write_atomically",
]
