"""Records to JSON and back, driven by their annotations."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, TypeVar

from compress.errors import ArtefactError, near_matches
from compress.result.runs import RESULT_FORMAT

RecordT = TypeVar("RecordT")


def to_dict(record: Any) -> dict[str, Any]:
    """Return a record as plain JSON data; numbers that are not finite become None."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(record))
    return plain


def to_json(record: Any) -> str:
    """Write a record as indented JSON."""
    return json.dumps(to_dict(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_dict(kind: type[RecordT], data: Any, where: str = "the result") -> RecordT:
    """Build a record of ``kind`` from what `to_dict` returned.

    A null where a plain number is expected reads as NaN, which is how it was written.

    Raises:
        ArtefactError: A key is unknown or missing, a value is of the wrong type, or the data was
            written in a newer format; the message names the place.
    """
    found = data.get("format") if isinstance(data, dict) else None
    if isinstance(found, int) and found > RESULT_FORMAT:
        raise ArtefactError(
            f"{where} has format {found} and this version of compress reads up to "
            f"{RESULT_FORMAT}; update compress to read it."
        )
    value: RecordT = _read(kind, data, where)
    return value


def from_json(kind: type[RecordT], text: str, where: str = "the result") -> RecordT:
    """Build a record of ``kind`` from what `to_json` wrote; errors as in `from_dict`."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ArtefactError(
            f"{where} is not valid JSON ({error}); it may be truncated. Run the command that "
            "wrote it again."
        ) from error
    return from_dict(kind, data, where)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
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
        return _read_record(kind, data, where)
    if origin is tuple and isinstance(data, list):
        inner_kind = typing.get_args(kind)[0]
        return tuple(_read(inner_kind, v, f"{where}[{i}]") for i, v in enumerate(data))
    if origin is dict and isinstance(data, dict):
        inner_kind = typing.get_args(kind)[1]
        return {k: _read(inner_kind, v, f"{where}.{k}") for k, v in data.items()}
    if kind is float:
        if data is None:
            return math.nan
        if isinstance(data, (int, float)) and not isinstance(data, bool):
            return float(data)
    elif kind in (int, str, bool) and type(data) is kind:
        return data
    name = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise ArtefactError(
        f"{where} should be of type {name} and is {type(data).__name__}; the file was edited or "
        "is damaged. Run the command that wrote it again."
    )


def _read_record(kind: Any, data: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    for key in data:
        if key not in hints:
            raise ArtefactError(
                f"{where} holds the unknown key {key!r}.{near_matches(key, hints)} It was edited "
                "or written by another version of compress."
            )
    ready = {k: _read(hints[k], v, f"{where}.{k}") for k, v in data.items()}
    for spec in dataclasses.fields(kind):
        needed = spec.default is dataclasses.MISSING and (
            spec.default_factory is dataclasses.MISSING
        )
        if needed and spec.name not in ready:
            raise ArtefactError(
                f"{where} lacks {spec.name!r}; the file is damaged or is not a result. Run the "
                "command that wrote it again."
            )
    return kind(**ready)
