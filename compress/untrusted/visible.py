"""Words from outside as a terminal may get them: nothing in them moves a cursor or turns a line."""

from __future__ import annotations

import re

from compress.errors import printable

# Control characters (C0 with DEL, and C1), marks and overrides of the writing direction, separators
# of lines that are no newline, and halves of characters, which cannot be encoded.
_CONTROLS = (
    "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
)
_HIDDEN = re.compile(f"[{_CONTROLS}]")


def visible(text: str, keep: str = "") -> str:
    r"""Return text with control characters written out, such as ``\x1b``.

    Args:
        text: The text.
        keep: Characters that stay as they are, such as newlines.
    """

    def written(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        if "\ud800" <= character <= "\udfff":
            return printable(character)
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _HIDDEN.sub(written, text)


def visible_json(text: str) -> str:
    """Return JSON that means the same with the control characters in its strings as escapes."""

    def escaped(match: re.Match[str]) -> str:
        return match[0] if match[0] in "\n\t" else f"\\u{ord(match[0]):04x}"

    return _HIDDEN.sub(escaped, text)
