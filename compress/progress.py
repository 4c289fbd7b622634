"""How long work reports where it is, without the library ever printing.

Functions that take a while take a `Track`, which wraps what they iterate over. The command line
passes a progress bar; the library's default passes the items through.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Wraps an iterable whose length is known."""

    def __call__(self, items: Iterable[T], description: str, total: int) -> Iterable[T]:
        """Yield the items, telling someone about it."""
        ...


def silent(items: Iterable[T], description: str, total: int) -> Iterable[T]:
    """Tell no one."""
    del description, total
    return items


def note(items: Iterable[object], text: str) -> None:
    """Show a text beside the progress of what a `Track` gave, where that is a bar."""
    show = getattr(items, "set_postfix_str", None)
    if show is not None:
        show(text)
