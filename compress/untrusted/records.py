"""Frozen records from plain data, every value checked against its annotation."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

from compress.errors import near_matches
from compress.untrusted.text import Unreadable

RecordT = TypeVar("RecordT")


def read_record(kind: type[RecordT], data: Any, where: str) -> RecordT:
    """Build a record from plain data, as ``dataclasses.asdict`` and JSON leave it.

    A null where a plain number is expected reads as NaN, which is how it was written. Whole
    numbers are counts, so none is negative.

    Args:
        kind: A dataclass, annotated with plain types, tuples, dicts and other such dataclasses.
        data: The plain data.
        where: What it is, for the message.

    Raises:
        Unreadable: A key is unknown or missing, or a value is of the wrong type; the message
            names the place.
    """
    value: RecordT = _read(kind, data, where)
    return value


def _read(kind: Any, data: Any, where: str) -> Any:
    """Read one value of an annotated type; ``where`` is its path, for the error."""
    origin = typing.get_origin(kind)
    if kind is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        inner = [k for k in typing.get_args(kind) if k is not type(None)]
        return None if data is None else _read(inner[0], data, where)
    if dataclasses.is_dataclass(kind) and isinstance(data, dict):
        return _read_fields(kind, data, where)
    if origin is tuple and isinstance(data, list):
        return _read_tuple(kind, data, where)
    if origin is dict and isinstance(data, dict):
        inner_kind = typing.get_args(kind)[1]
        return {k: _read(inner_kind, v, f"{where}.{k}") for k, v in data.items()}
    return _read_plain(kind, data, where)


def _read_tuple(kind: Any, data: list[Any], where: str) -> tuple[Any, ...]:
    kinds = typing.get_args(kind)
    if kinds[-1] is ...:
        kinds = (kinds[0],) * len(data)
    if len(kinds) != len(data):
        raise Unreadable(f"{where} should have {len(kinds)} parts and has {len(data)}")
    parts = enumerate(zip(kinds, data, strict=True))
    return tuple(_read(inner, value, f"{where}[{i}]") for i, (inner, value) in parts)


def _read_plain(kind: Any, data: Any, where: str) -> Any:
    if kind is float and data is None:
        return math.nan
    if kind is float and type(data) in (int, float):
        return float(data)
    if kind is int and type(data) is int and data < 0:
        raise Unreadable(f"{where} should be a number from 0 and is {data}")
    if kind in (int, str, bool) and type(data) is kind:
        return data
    plain = typing.get_origin(kind) is None
    name = getattr(kind, "__name__", str(kind)) if plain else str(kind)
    raise Unreadable(f"{where} should be of type {name} and is {type(data).__name__}")


def _read_fields(kind: Any, data: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    for key in data:
        if key not in hints:
            raise Unreadable(f"{where} holds the unknown key {key!r}.{near_matches(key, hints)}")
    ready = {k: _read(hints[k], v, f"{where}.{k}") for k, v in data.items()}
    for spec in dataclasses.fields(kind):
        needed = spec.default is dataclasses.MISSING and (
            spec.default_factory is dataclasses.MISSING
        )
        if needed and spec.name not in ready:
            raise Unreadable(f"{where} lacks {spec.name!r}")
    return kind(**ready)
