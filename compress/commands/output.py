"""Printing on whatever stdout and stderr are: any encoding, a full disk, a pipe nobody reads."""

from __future__ import annotations

import codecs
import os
import sys
from contextlib import suppress
from typing import TextIO

import click

from compress.errors import ArtefactError
from compress.untrusted import visible

# What stands in for characters that an encoding lacks. Without its sign a number would mislead.
_PLAIN = {
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{RIGHTWARDS ARROW}": ">",
    "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{MICRO SIGN}": "u",
}
_HANDLER = "compress.plain"


def say(*lines: str, err: bool = False) -> None:
    """Print lines, with a stand-in for each character that the stream's encoding lacks.

    Control characters in them are written out: names in them come from files.

    Args:
        *lines: The lines.
        err: Print on stderr.

    Raises:
        BrokenPipeError: Nobody reads the other end of the pipe any more.
        ArtefactError: The stream takes no more, such as a file on a full disk.
    """
    stream = sys.stderr if err else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        click.echo("\n".join(fitting(line, encoding) for line in lines), err=err)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(stream)
        raise cannot_print(error) from error


def fitting(text: str, encoding: str) -> str:
    """Return a line as an encoding can hold it, and as no terminal obeys it."""
    return visible(text, keep="\t").encode(encoding, _HANDLER).decode(encoding)


def cannot_print(error: OSError) -> ArtefactError:
    """Return the error that says that a command's words could not be printed."""
    return ArtefactError(
        f"The output cannot be printed: {error.strerror}; send it somewhere with space. What the "
        "command wrote into files is complete."
    )


def discard(stream: TextIO | None) -> None:
    """Let what a stream has not written vanish: Python would try again at the end, and complain."""
    with suppress(OSError, ValueError, AttributeError):  # none, or not one of the system's
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())  # type: ignore[union-attr]  # None: see above
        os.close(descriptor)


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in missing), error.end


codecs.register_error(_HANDLER, _stand_in)
