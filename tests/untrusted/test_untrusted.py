"""Limits on what comes from outside: each refused at its edge, and what is honest let through."""

from __future__ import annotations

import gzip
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from compress.untrusted import (
    Unreadable,
    check_expansion,
    decode,
    open_archive,
    open_gzip,
    parse_json,
    parse_toml,
    read_record,
    read_text,
    visible,
    visible_json,
)
from compress.untrusted.expansion import FREE_BYTES, LARGEST_FACTOR
from compress.untrusted.text import MOST_DEPTH

# --- Text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "latin-1"])
def test_other_encodings_are_named_or_refused(encoding: str) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    with pytest.raises(Unreadable, match="UTF-8"):
        decode(f"{mark}é = 1".encode(encoding))


def test_a_byte_order_mark_of_utf_8_is_no_part_of_the_text() -> None:
    assert decode("é".encode("utf-8-sig")) == "é"


def test_files_are_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 2048)
    assert read_text(path, 2048) == "x" * 2048
    with pytest.raises(Unreadable, match="more than 1 KiB"):
        read_text(path, 2047)


def test_what_is_nested_is_read_to_a_depth_and_no_deeper() -> None:
    inner = MOST_DEPTH - 1
    assert parse_json("[" * inner + "1" + "]" * inner)
    for levels in (MOST_DEPTH, 900, 100_000):
        with pytest.raises(Unreadable, match="deep"):
            parse_json("[" * levels + "1" + "]" * levels)
        with pytest.raises(Unreadable, match="deep"):
            parse_toml(f"a = {'[' * levels}{']' * levels}")
        with pytest.raises(Unreadable, match="deep"):
            parse_toml("a." * levels + "b = 1")
    assert parse_toml("rank = {'layer1.0.conv1.a.b.c' = '4'}\nmean = [0.1, 0.2]")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("NaN", "NaN"),
        ("[-Infinity]", "-Infinity"),
        ("1e999", "too large"),
        (str(1 << 63), "64 bits"),
        ("9" * 5000, "64 bits"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        (r'"\ud800"', "half a character"),
        (r'{"\ud800": 1}', "half a character"),
        ("{", "Expecting"),
        ("", "Expecting"),
    ],
)
def test_json_that_is_not_written_here(text: str, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        parse_json(text)


def test_json_that_is() -> None:
    largest = (1 << 63) - 1
    assert parse_json(f'{{"a": [{largest}, -{largest}, 1e308, null, "😀\\ud83d\\ude00"]}}') == {
        "a": [largest, -largest, 1e308, None, "😀😀"]
    }


# --- Records -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    name: str
    pair: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Outer:
    count: int
    share: float
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    named: dict[str, int] = field(default_factory=dict)


def test_records_are_built_by_their_annotations() -> None:
    data = {"count": 1, "share": 2, "many": [{"name": "a", "pair": ["b", "c"]}], "named": {"x": 3}}
    assert read_record(Outer, data, "it") == Outer(
        1, 2.0, None, (Inner("a", ("b", "c")),), {"x": 3}
    )
    assert np.isnan(read_record(Outer, {"count": 0, "share": None}, "it").share)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"count": -1}, r"it\.count should be a number from 0"),
        ({"count": True}, r"it\.count should be of type int and is bool"),
        ({"count": 1.0}, r"it\.count should be of type int"),
        ({"share": "1"}, r"it\.share should be of type float"),
        ({"inner": []}, r"it\.inner should be of type Inner"),
        ({"many": {}}, r"it\.many should be of type tuple"),
        ({"many": [{"name": "a", "pair": ["b"]}]}, r"it\.many\[0\]\.pair should have 2 parts"),
        ({"named": {"x": "1"}}, r"it\.named\.x should be of type int"),
        ({"cuont": 1}, "Did you mean 'count'"),
    ],
)
def test_values_of_another_type_are_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        read_record(Outer, {"count": 1, "share": 0.5, **change}, "it")
    with pytest.raises(Unreadable, match="lacks 'count'"):
        read_record(Outer, {"share": 1.0}, "it")


# --- Growth ------------------------------------------------------------------------------------


def test_growth_is_refused_beyond_both_limits_only() -> None:
    check_expansion(1, FREE_BYTES)
    check_expansion(FREE_BYTES, LARGEST_FACTOR * FREE_BYTES)
    for small in (1, FREE_BYTES):
        with pytest.raises(Unreadable, match="times as many"):
            check_expansion(small, max(FREE_BYTES, LARGEST_FACTOR * small) + 1)


def archive(path: Path, members: list[tuple[str, bytes]], method: int) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, of a name that is there twice
        with zipfile.ZipFile(path, "w", method) as file:
            for name, body in members:
                file.writestr(name, body)
    return path


def test_archives_are_opened_where_reading_them_is_safe(tmp_path: Path) -> None:
    good = archive(tmp_path / "a.zip", [("a", b"x" * 1000), ("b", b"")], zipfile.ZIP_DEFLATED)
    with open_archive(good) as (file, members):
        assert [(m.name, m.size) for m in members] == [("a", 1000), ("b", 0)]
        assert file.read("a") == b"x" * 1000
    cases = (
        ([("a", b"1"), ("A", b"2")], zipfile.ZIP_STORED, "twice"),
        ([("a", b"1")], zipfile.ZIP_BZIP2, "packed in a way"),
        ([("a", bytes(FREE_BYTES)), ("b", b"1")], zipfile.ZIP_DEFLATED, "times as many"),
    )
    for held, method, reason in cases:
        bad = archive(tmp_path / "b.zip", held, method)
        with pytest.raises(Unreadable, match=reason), open_archive(bad):
            pass
    good = archive(tmp_path / "a.zip", [("a", b"x" * 1000)], zipfile.ZIP_STORED)
    damaged = bytearray(good.read_bytes())
    damaged[500] ^= 1
    good.write_bytes(damaged)
    with pytest.raises(Unreadable), open_archive(good) as (file, _):
        file.read("a")


def test_gzip_that_ends_early_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"abc" * 100)[:-9])
    with pytest.raises(Unreadable), open_gzip(path) as file:
        file.read()
    path.write_bytes(b"plain")
    with open_gzip(path) as file:
        assert file.read() == b"plain"


# --- Printing ----------------------------------------------------------------------------------


def test_control_characters_are_written_out() -> None:
    text = "\x1b[31m a\tb\nc \x7f\x9b \u202e \ud800 é 😀"
    assert visible(text) == r"\x1b[31m a\x09b\x0ac \x7f\x9b \u202e \ud800 é 😀"
    assert visible("caf\udce9") == r"caf\xe9"  # a byte of a name that is not UTF-8
    assert visible("a\tb\nc", keep="\n\t") == "a\tb\nc"


def test_json_means_the_same_with_its_control_characters_escaped() -> None:
    text = '{"a\u202e": "\x9b é"}'
    assert visible_json(text) == '{"a\\u202e": "\\u009b é"}'
    assert parse_json(visible_json(text)) == parse_json(text)
