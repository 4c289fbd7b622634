"""Records to JSON and back, driven by their annotations."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, TypeVar

from compress.errors import ArtefactError, printable
from compress.result.runs import RESULT_FORMAT
from compress.untrusted import Unreadable, parse_json, read_record

RecordT = TypeVar("RecordT")


def to_dict(record: Any) -> dict[str, Any]:
    """Return a record as plain JSON data; numbers that are not finite become None."""
    plain: dict[str, Any] = plain_data(dataclasses.asdict(record))
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
    try:
        return read_record(kind, data, where)
    except Unreadable as error:
        raise ArtefactError(
            f"{error}; the file was edited, is damaged or was written by another version of "
            "compress. Run the command that wrote it again."
        ) from error


def from_json(kind: type[RecordT], text: str, where: str = "the result") -> RecordT:
    """Build a record of ``kind`` from what `to_json` wrote; errors as in `from_dict`."""
    try:
        data = parse_json(text)
    except Unreadable as error:
        raise ArtefactError(
            f"{where} is not valid JSON ({error}); it may be truncated. Run the command that "
            "wrote it again."
        ) from error
    return from_dict(kind, data, where)


def plain_data(value: Any) -> Any:
    r"""Return dicts, lists and values as JSON can hold them.

    Numbers that are not finite become None. Names of files may hold bytes that are no text, which
    Python keeps as halves of characters: they become escapes such as ``\udcff``.
    """
    if isinstance(value, dict):
        return {printable(str(k)): plain_data(v) for k, v in value.items()}
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, (list, tuple)):
        return [plain_data(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
