"""Configurations from plain values and from TOML files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.config.record import Role, RunConfig, settings_of
from compress.errors import ConfigError, near_matches
from compress.rules import RULE_NAMES
from compress.untrusted import Unreadable, parse_toml, read_text


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a configuration file.

    Returns:
        The settings it holds, ready to be overridden by flags and passed to `make_config`.

    Raises:
        ConfigError: The file is missing, is not TOML or holds an unknown key.
    """
    try:
        values = parse_toml(read_text(path))
    except OSError as error:
        raise ConfigError(
            f"The configuration file {path} cannot be read: {error.strerror}."
        ) from error
    except Unreadable as error:
        raise ConfigError(f"The configuration file {path} is not valid TOML: {error}.") from error
    check_keys(values, f"the configuration file {path}")
    return values


def check_keys(values: Mapping[str, Any], where: str) -> None:
    """Raise `ConfigError` for keys that are not settings, with near matches and the valid ones."""
    valid = settings_of(*Role)
    for key in values:
        if key not in valid:
            raise ConfigError(
                f"Unknown key {key!r} in {where}.{near_matches(key, valid)} "
                f"The valid keys are {', '.join(valid)}."
            )


def make_config(values: Mapping[str, Any]) -> RunConfig:
    """Build a checked `RunConfig` from plain values; lists become tuples.

    Raises:
        ConfigError: An unknown key, a value of the wrong type or out of range.
    """
    check_keys(values, "the settings")
    ready: dict[str, Any] = {}
    rules = {name: _typed(name, "float | None", values.get(name)) for name in RULE_NAMES}
    ready["rules"] = {name: value for name, value in rules.items() if value is not None}
    for spec in dataclasses.fields(RunConfig):
        if spec.name not in values or spec.name == "rules":
            continue
        value = values[spec.name]
        if isinstance(value, list):
            value = tuple(value)
        if isinstance(value, dict):
            value = {str(k): str(v) for k, v in value.items()}
        ready[spec.name] = _typed(spec.name, str(spec.type), value)
    return RunConfig(**ready)


_EXPECTED: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "tuple": (tuple,),
    "dict": (dict,),
}


def _typed(name: str, annotation: str, value: Any) -> Any:
    if value is None and "None" in annotation:
        return None
    for alternative in annotation.split("|"):
        base, _, inner = alternative.strip().partition("[")
        if type(value) not in _EXPECTED.get(base, ()):  # exactly: True is an int to isinstance
            continue
        if isinstance(value, tuple):
            inner = inner.split(",")[0]
            return tuple(_typed(f"each of {name}", inner, part) for part in value)
        return float(value) if base == "float" else value
    raise ConfigError(f"{name} = {value!r} should be of type {annotation}.")
