"""Image files that announce what they do not hold, hold nothing, or grow without end."""

from __future__ import annotations

import gzip
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from compress.data import Preprocessing, open_dataset
from compress.errors import DataError
from compress.vision.pictures import MOST_PIXELS, read_image

IDENTITY = Preprocessing()
IMAGES = np.zeros((3, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.array([0, 1, 100_000_000]), "reach up to 100000000"),
        (np.array([0, 1, 1 << 63], np.uint64), "reach down to"),
        (np.array([0, 1, 2], np.uint16), ""),
        (np.array([0, 1, 999_999]), ""),
    ],
)
def test_labels_are_classes(tmp_path: Path, labels: np.ndarray, words: str) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=IMAGES, labels=labels)
    if not words:
        assert open_dataset(f"tensors:{path}", IDENTITY).labels[:2] == (0, 1)
        return
    with pytest.raises(DataError, match=words):
        open_dataset(f"tensors:{path}", IDENTITY)


@pytest.mark.parametrize("shape", [(3, 0, 4), (3, 4, 0), (3, 1, 0, 4)])
def test_images_have_pixels(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=np.zeros(shape, np.uint8))
    with pytest.raises(DataError, match="no pixels"):
        open_dataset(f"tensors:{path}", IDENTITY)


def npz(path: Path, header: bytes, body: bytes) -> Path:
    text = header + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images.npy", b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + body)
    return path


@pytest.mark.parametrize(
    ("header", "body", "words"),
    [
        (b"{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999, 4, 4)}", b"", "holds 0"),
        (b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 4, 4)}", bytes(17), "holds 17"),
        (b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, -4, 4)}", bytes(16), "shape"),
        (b"(" * 3000, b"", "no plain array"),
        (b"{'descr': '|u1', 'fortran_order': False, 'shape': (134217729,)}", bytes((1 << 27) + 1),
         "times as many"),
    ],
)  # fmt: skip
def test_npz_that_announces_what_it_does_not_hold(
    tmp_path: Path, header: bytes, body: bytes, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        open_dataset(f"tensors:{npz(tmp_path / 'a.npz', header, body)}", IDENTITY)


@pytest.mark.parametrize(
    ("sizes", "body", "words"),
    [
        ((1 << 31, 1 << 31, 1 << 31), b"", "times as many"),
        ((1 << 16, 1 << 16, 1 << 16, 1 << 16), b"", "times as many"),
        ((2, 2, 2), bytes(7), "holds 7"),
        ((2, 2, 2), bytes(9), "holds more"),
        ((0, 2, 2), b"", "holds nothing"),
        ((2, 0, 2), b"", "holds nothing"),
        ((0, 1 << 31, 1 << 31, 1 << 31), b"", "holds nothing"),
        ((1,) * 200, b"1", "damaged"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_idx_that_announces_what_it_does_not_hold(
    tmp_path: Path, sizes: tuple[int, ...], body: bytes, words: str, *, packed: bool
) -> None:
    data = bytes((0, 0, 8, len(sizes))) + struct.pack(f">{len(sizes)}I", *sizes) + body
    path = tmp_path / "a.idx"
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(DataError, match=words):
        open_dataset(f"idx:{path}", IDENTITY)


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(10))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height"), [(0, 5), (5, 0), (MOST_PIXELS + 1, 1), (10_000, 10_000), (60_000, 60_000)]
)
def test_pictures_of_no_pixels_or_too_many(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(width, height))
    with pytest.raises(DataError, match=r"a\.png"):
        read_image(path, 3)


def test_a_class_map_of_very_many_names_takes_no_time_for_each_pair(tmp_path: Path) -> None:
    path, images = tmp_path / "names.txt", tmp_path / "a.npz"
    names = [str(k) for k in range(300_000)]
    np.savez(images, images=IMAGES, labels=np.arange(3))
    path.write_text("\n".join(names))
    assert open_dataset(f"tensors:{images}", IDENTITY, str(path)).label(2) == 2
    path.write_text("\n".join([*names, "7"]))
    with pytest.raises(DataError, match="names '7' twice"):
        open_dataset(f"tensors:{images}", IDENTITY, str(path))


def test_a_class_map_in_another_encoding_is_named(tmp_path: Path) -> None:
    path, images = tmp_path / "names.txt", tmp_path / "a.npz"
    np.savez(images, images=IMAGES, labels=np.arange(3))
    path.write_bytes("0\n1\n2\n".encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16; save it as UTF-8"):
        open_dataset(f"tensors:{images}", IDENTITY, str(path))
