"""Damage and malice: what happens to bytes, and to trees of plain data, by a seeded generator."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

ByteMutator = Callable[[random.Random, bytes], bytes]

HOSTILE_TEXTS = (
    "",
    " ",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "a\0b",
    "line\nbreak\r\ttab",
    "\x9b2J",
    "\u202eright to left",
    "\ud800 alone",
    "=1+1",
    "@SUM(A1)",
    "+1",
    "-1",
    "</script><script>alert(1)</script>",
    "a|b`c*d_e[f](g)",
    "../../../etc/passwd",
    "%s%n{0}{x}",
    "é" * 200,
    "x" * 100_000,
    "module." * 20_000 + "weight",
    "denselayer1" * 20_000,
    "torchvision:resnet18?num_classes=99999999999",
)
HUGE_NUMBERS = (
    -1, 0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30,
    100_000_000, 10**400,
)  # fmt: skip
ODD_FLOATS = (
    float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 5e-324, -0.0, 0.5, 1e18,
)  # fmt: skip


# Stands in a tree for lists in each other, as many as the number after it says: a real one would
# break what makes the case.
DEEP = "lists in lists: "


# --- Bytes -------------------------------------------------------------------------------------


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    """Flip one to eight bits."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_early_bits(rng: random.Random, data: bytes) -> bytes:
    """Flip bits near the start, where headers are."""
    head = min(len(data), 256)
    return flip_bits(rng, data[:head]) + data[head:]


def truncate(rng: random.Random, data: bytes) -> bytes:
    """Cut the end off."""
    return data[: rng.randrange(len(data) + 1)]


def drop(rng: random.Random, data: bytes) -> bytes:
    """Take a piece out of the middle."""
    start, stop = _span(rng, data)
    return data[:start] + data[stop:]


def duplicate(rng: random.Random, data: bytes) -> bytes:
    """Repeat a piece."""
    start, stop = _span(rng, data)
    return data[:stop] + data[start:stop] * rng.choice((1, 1, 2, 50)) + data[stop:]


def splice(rng: random.Random, data: bytes) -> bytes:
    """Write one piece over another."""
    start, stop = _span(rng, data)
    place = rng.randrange(len(data) + 1)
    return data[:place] + data[start:stop] + data[place + stop - start :]


def insert(rng: random.Random, data: bytes) -> bytes:
    """Put random bytes in."""
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.randint(1, 64)) + data[place:]


def set_integer(rng: random.Random, data: bytes) -> bytes:
    """Write an extreme number over a field of 1 to 8 bytes, as lengths and shapes are stored."""
    size = rng.choice((1, 2, 4, 4, 8, 8))
    if len(data) < size:
        return data
    head = rng.random() < 0.5
    place = rng.randrange(min(len(data), 128 if head else len(data)) - size + 1)
    number = rng.choice(HUGE_NUMBERS) % (1 << 8 * size)
    order = rng.choice(("little", "big"))
    field = number.to_bytes(size, "little" if order == "little" else "big")
    return data[:place] + field + data[place + size :]


def grow_number(rng: random.Random, data: bytes) -> bytes:
    """Replace a number in writing by a huge one."""
    found = list(re.finditer(rb"\d+", data[:200_000]))
    if not found:
        return data
    match = rng.choice(found)
    number = str(rng.choice(HUGE_NUMBERS)).encode()
    return data[: match.start()] + number + data[match.end() :]


def fill(rng: random.Random, data: bytes) -> bytes:
    """Overwrite a piece with one byte."""
    start, stop = _span(rng, data)
    return data[:start] + bytes([rng.choice((0, 0xFF, 0x80, 0x20))]) * (stop - start) + data[stop:]


def nest(rng: random.Random, data: bytes) -> bytes:
    """Put very many brackets somewhere."""
    place = rng.randrange(len(data) + 1)
    mark = rng.choice((b"[", b"{", b"(", b'{"a":', b"[[", b"]"))
    return data[:place] + mark * rng.choice((100, 5_000, 200_000)) + data[place:]


def reencode(rng: random.Random, data: bytes) -> bytes:
    """Write text in another encoding, or with a mark that says so."""
    text = data.decode("utf-8", "replace")
    kind = rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "nul"))
    if kind == "nul":
        return data.replace(b"\n", b"\0", 3)
    return text.encode(kind, "replace")


BYTE_MUTATORS: tuple[ByteMutator, ...] = (
    flip_bits, flip_bits, flip_early_bits, flip_early_bits, truncate, drop, duplicate, splice,
    insert, set_integer, set_integer, set_integer, grow_number, fill, nest,
)  # fmt: skip
TEXT_MUTATORS: tuple[ByteMutator, ...] = (
    flip_bits, truncate, drop, duplicate, splice, insert, grow_number, grow_number, fill, nest,
    reencode,
)  # fmt: skip


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 4, 16, 200, 5_000)))


def mutated(rng: random.Random, data: bytes, mutators: tuple[ByteMutator, ...]) -> bytes:
    """Apply one to three mutators."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(mutators)(rng, data)
    return data


# --- Trees -------------------------------------------------------------------------------------


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in a tree of dicts and lists, its root included."""
    yield path
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from places(value, (*path, key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree[:50]):
            yield from places(value, (*path, index))


def odd_value(rng: random.Random, *, plain: bool) -> Any:
    """Return a value that hardly anything expects.

    Args:
        rng: The generator.
        plain: Whether it is to be of those that every format can hold.
    """
    kind = rng.randrange(8 if plain else 10)
    if kind < 2:
        return rng.choice(HOSTILE_TEXTS)
    if kind < 4:
        return rng.choice(HUGE_NUMBERS[:8] if plain else HUGE_NUMBERS)
    if kind == 4:
        return rng.choice(ODD_FLOATS)
    if kind == 5:
        return rng.choice((True, False))
    if kind == 6:
        return rng.choice(([], [1, "a"], [[]], [{}]))
    if kind == 7:
        return rng.choice(({}, {"a": 1}, {"format": 1}))
    if kind == 8:
        return None
    return DEEP + str(rng.choice((40, 60, 900, 3_000, 100_000)))


def mutate_tree(rng: random.Random, tree: Any, *, plain: bool = False) -> Any:
    """Return a tree with one to three places changed: swapped, taken out, doubled, renamed.

    Args:
        rng: The generator.
        tree: Dicts, lists and plain values; left as it is.
        plain: Whether only values may come in that every format can hold.
    """
    root = {"": copy.deepcopy(tree)}
    for _ in range(rng.choice((1, 1, 2, 3))):
        path = rng.choice([p for p in places(root) if p])
        _change(rng, root, path, plain=plain)
    return root.get("")


def _change(rng: random.Random, root: Any, path: tuple[Any, ...], *, plain: bool) -> None:
    parent = root
    for step in path[:-1]:
        parent = parent[step]
    key, how = path[-1], rng.randrange(10)
    if how == 0 and len(path) > 1:
        del parent[key]
    elif how == 1 and isinstance(parent, dict) and len(path) > 1:
        parent[rng.choice(HOSTILE_TEXTS)] = parent.pop(key)
    elif how == 2 and isinstance(parent, dict):
        parent[rng.choice(("extra", *HOSTILE_TEXTS))] = odd_value(rng, plain=plain)
    elif how == 3 and isinstance(parent, list):
        parent.extend(copy.deepcopy(parent[:20]))
    elif how == 4:
        other = root
        for step in rng.choice([p for p in places(root) if p]):
            other = other[step]
        parent[key] = copy.deepcopy(other)
    elif how == 5 and isinstance(parent[key], int | float):
        parent[key] = -parent[key]
    else:
        parent[key] = odd_value(rng, plain=plain)


def to_json(tree: Any, rng: random.Random) -> bytes:
    """Write a tree as JSON, whatever is in it; sometimes with a key twice."""
    text = json.dumps(tree, ensure_ascii=True)
    text = re.sub(f'"{DEEP}(\\d+)"', lambda m: "[" * int(m[1]) + "]" * int(m[1]), text)
    if rng.random() < 0.1:
        text = re.sub(r'("\w+": )', r"\g<1>0, \g<1>", text, count=1)
    return text.encode("utf-8", "surrogatepass")
