"""What can be known of a job's outputs before it begins."""

from __future__ import annotations

import os

from compress.config import RunConfig
from compress.deploy.compiled import require_compiler
from compress.deploy.engines import engine_named, require_exporter
from compress.deploy.file import COMPILED, ONNX
from compress.files import check_file, check_room, check_writable
from compress.inputs.load import weight_files

# No rule makes a network so much smaller that its tensors take less than this part.
_SMALLEST_PART = 0.05
_REPORT_BYTES = 100_000


def check_places(config: RunConfig) -> None:
    """Find out whether a job's result folder and files can be written, before hours of work.

    Raises:
        ArtefactError: One cannot, or the disk is certainly too full.
        CheckpointError, ModelError: The checkpoint's files cannot be found.
        ConfigError, ModelError: As `check_runtime`.
    """
    check_runtime(config)
    check_files(config)
    if config.output:
        check_writable(config.output)
        weights = sum(file.stat().st_size for file in weight_files(config) if file.is_file())
        check_room(config.output, int(weights * _SMALLEST_PART) + _REPORT_BYTES)


def check_runtime(config: RunConfig) -> None:
    """Find out whether what networks are to be timed on and exported with is here.

    Raises:
        ConfigError, ModelError: As `compress.deploy.engines.engine_named`.
    """
    if not config.no_latency:
        engine_named(config.runtime, config.device)
    if config.export == ONNX:
        require_exporter()
    if config.export == COMPILED:
        require_compiler("--export aoti")


def check_files(config: RunConfig) -> None:
    """Find out whether the calibration and the latency table can be written.

    A calibration that is there already is only read.

    Raises:
        ArtefactError: One cannot.
    """
    if config.calibration and not os.path.exists(config.calibration):
        check_file(config.calibration, "calibration")
    if config.latency_table:
        check_file(config.latency_table, "latency table")
