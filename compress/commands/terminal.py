"""What reaches the terminal: results on stdout, progress on stderr, tables that line up."""

from __future__ import annotations

import codecs
import json
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

from compress.commands.output import say
from compress.untrusted import visible, visible_json

T = TypeVar("T")


@dataclass(frozen=True)
class Terminal:
    """Where a command writes.

    Attributes:
        quiet: Print nothing but errors.
        as_json: Print the result as JSON, and nothing else, on stdout.
    """

    quiet: bool = False
    as_json: bool = False

    def track(self, items: Iterable[T], description: str, total: int) -> Iterable[T]:
        """Show a progress bar with rate and time left on stderr; a `compress.progress.Track`."""
        if self.quiet or sys.stderr is None or not sys.stderr.isatty():
            return items
        from tqdm import tqdm

        return tqdm(
            items,
            desc=visible(description),
            total=total,
            leave=False,
            file=sys.stderr,
            dynamic_ncols=True,
        )

    def show(self, plain: Any, lines: Iterable[str]) -> None:
        """Print a result: its data with --json, else its lines; nothing with --quiet.

        Args:
            plain: JSON data.
            lines: The same for a reader.
        """
        if self.as_json:
            # Escaped where the stream could not hold it: a stand-in would be another value.
            ascii_only = not _is_utf8(sys.stdout)
            text = json.dumps(_finite(plain), indent=1, ensure_ascii=ascii_only, allow_nan=False)
            say(*visible_json(text).split("\n"))
        elif not self.quiet:
            for line in lines:
                say(line)


def _finite(plain: Any) -> Any:
    from compress.result import plain_data  # here, because --help must be quick

    return plain_data(plain)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Line up columns: the first ``left`` to the left, the others to the right."""
    # Made visible here already, so that the columns line up.
    cells = [[visible(str(c)) for c in row] for row in (head, *rows)]
    widths = [max(_width(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for number, row in enumerate(cells):
        padded = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - _width(cell))
            padded.append(cell + space if i < left else space + cell)
        lines.append(("  ".join(padded)).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return lines


def shortened(names: Iterable[str], most: int = 3) -> str:
    """List the first few of some names, and how many more there are."""
    names = list(names)
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"


def _is_utf8(stream: TextIO | None) -> bool:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return codecs.lookup(encoding).name == "utf-8"


def _width(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)
