"""Text, JSON and TOML from outside: bounded in size and depth, and nothing in them twice."""

from __future__ import annotations

import codecs
import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MEBIBYTE = 1 << 20
MOST_TEXT = 256 * MEBIBYTE
# tomllib's time grows with the square of some sizes.
MOST_TOML = MEBIBYTE // 4
MOST_DEPTH = 64
_LARGEST = 1 << 63

# The longer marks first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_QUOTED = re.compile(r'"[^"\n]*"|' + r"'[^'\n]*'")
_MOST_DOTS = 100  # on a line of TOML outside quotes


class Unreadable(ValueError):  # noqa: N818 - a reason, of which its reader makes an error
    """Content that is not what it should be; the message is the reason, without a full stop."""


def read_text(path: str | Path, most: int = MOST_TEXT) -> str:
    """Read a file of UTF-8 text.

    Args:
        path: The file.
        most: How many bytes it may have.

    Raises:
        OSError: It cannot be opened or read.
        Unreadable: It is larger, or not UTF-8.
    """
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise Unreadable(f"it has more than {most // 1024:,} KiB, which no such file needs")
    return decode(data)


def decode(data: bytes) -> str:
    """Decode UTF-8 text, with or without a byte order mark.

    Raises:
        Unreadable: It is written in something else.
    """
    for mark, name in _MARKS:
        if data.startswith(mark):
            raise Unreadable(f"it is written in {name}; save it as UTF-8")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"it is not UTF-8 text (at byte {error.start}); save it as UTF-8"
        ) from error


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: It cannot be opened or read.
        Unreadable: As `parse_json`, or it is too large or not UTF-8.
    """
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """Parse JSON as this package writes it.

    Raises:
        Unreadable: It is no JSON, nested more than `MOST_DEPTH` deep, has a key twice, numbers
            that are not finite or beyond 64 bits, or characters that no text can hold.
    """
    try:
        value = json.loads(
            text,
            parse_constant=_constant,
            parse_int=_whole,
            parse_float=_finite,
            object_pairs_hook=_unique,
        )
    except RecursionError as error:
        raise Unreadable(f"it is nested more than {MOST_DEPTH} deep") from error
    except Unreadable:
        raise
    except ValueError as error:
        raise Unreadable(str(error)) from error
    _check_tree(value)
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        Unreadable: It is no TOML, nested more than `MOST_DEPTH` deep, or has whole numbers beyond
            64 bits.
    """
    deepest = max((_QUOTED.sub("", line).count(".") for line in text.splitlines()), default=0)
    if len(text) > MOST_TOML:
        raise Unreadable(f"it has more than {MOST_TOML // 1024:,} KiB, which no such file needs")
    if deepest > _MOST_DOTS:
        raise Unreadable(f"it is nested more than {MOST_DEPTH} deep")
    try:
        values = tomllib.loads(text)
    except RecursionError as error:
        raise Unreadable(f"it is nested more than {MOST_DEPTH} deep") from error
    except ValueError as error:
        raise Unreadable(str(error)) from error
    _check_tree(values)
    return values


def _constant(name: str) -> float:
    raise Unreadable(f"it holds {name}, which is no number of JSON")


def _whole(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) >= _LARGEST:
        raise Unreadable(f"it holds the number {digits[:20]}…, which is beyond 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise Unreadable(f"it holds the number {digits[:20]}, which is too large")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Unreadable(f"it has the key {twice[:100]!r} twice in one place")
    return made


def _check_tree(root: Any) -> None:
    """Check depth, whole numbers and characters of a tree of plain data, without recursion."""
    level: list[Any] = [root]
    for _ in range(MOST_DEPTH):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return
    raise Unreadable(f"it is nested more than {MOST_DEPTH} deep")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        for key in value:
            _check_characters(key)
        return value.values()
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        _check_characters(value)
    elif isinstance(value, int) and abs(value) >= _LARGEST:
        raise Unreadable("it holds a whole number beyond 64 bits")
    return ()


def _check_characters(text: str) -> None:
    """Refuse halves of characters, which cannot be written again."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Unreadable("it holds half a character (a lone surrogate)") from error
