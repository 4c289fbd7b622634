"""The run's configuration: every default in one frozen record, TOML in and out.

Precedence is default < config file < flag. An unknown key is an error that lists the valid ones.
"""

from compress.config.reading import check_keys, make_config, read_toml
from compress.config.record import Role, RunConfig, settings_of
from compress.config.values import (
    COMPILE,
    EXPORTS,
    LARGEST_SEED,
    METRICS,
    RUNTIMES,
    TASK_NAMES,
    TORCH,
    WAYS,
)

__all__ = [
    "COMPILE",
    "EXPORTS",
    "LARGEST_SEED",
    "METRICS",
    "RUNTIMES",
    "TASK_NAMES",
    "TORCH",
    "WAYS",
    "Role",
    "RunConfig",
    "check_keys",
    "make_config",
    "read_toml",
    "settings_of",
]
