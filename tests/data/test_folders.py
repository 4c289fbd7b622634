"""Folders of pictures as file systems may hold them: links, pipes, foreign names, no permission."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from workbench import SPEC, Workbench, command, made_images, paragraph

from compress.data import ImageSet, Preprocessing, open_dataset
from compress.errors import DataError

LATIN_1 = os.fsdecode(b"caf\xe9")


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), 100, np.uint8)).save(path)
    return path


def opened(root: Path) -> ImageSet:
    return open_dataset(f"imagefolder:{root}", Preprocessing())


def names(root: Path) -> list[str]:
    images = opened(root)
    return [images.name(index) for index in range(len(images))]


# --- Links -------------------------------------------------------------------------------------


def test_a_link_to_a_folder_above_multiplies_nothing(tmp_path: Path) -> None:
    picture(tmp_path / "set" / "ant" / "1.png")
    picture(tmp_path / "set" / "bee" / "2.png")
    for name, target in {"up": "..", "here": ".", "top": "../.."}.items():
        (tmp_path / "set" / "ant" / name).symlink_to(target)
    (tmp_path / "set" / "all").symlink_to(".")
    (tmp_path / "other").mkdir()
    assert names(tmp_path / "set") == ["ant/1.png", "bee/2.png"]
    assert opened(tmp_path / "set").classes == ("ant", "bee")


def test_links_that_multiply_without_a_circle_are_read_once(tmp_path: Path) -> None:
    """Each of 30 folders has two links to the next: 2 ** 30 ways to one picture."""
    picture(tmp_path / "deep" / "30" / "1.png")
    for level in reversed(range(30)):
        (tmp_path / "deep" / str(level)).mkdir()
        for name in "xy":
            (tmp_path / "deep" / str(level) / name).symlink_to(tmp_path / "deep" / str(level + 1))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "ant").symlink_to(tmp_path / "deep" / "0")
    assert names(tmp_path / "set") == ["ant/" + "x/" * 30 + "1.png"]


def test_links_to_folders_and_pictures_are_followed(tmp_path: Path) -> None:
    picture(tmp_path / "store" / "1.png")
    (tmp_path / "set" / "ant").mkdir(parents=True)
    (tmp_path / "set" / "bee").symlink_to(tmp_path / "store")
    (tmp_path / "set" / "ant" / "alone.png").symlink_to(tmp_path / "store" / "1.png")
    (tmp_path / "set" / "ant" / "more").symlink_to(tmp_path / "store")
    assert names(tmp_path / "set") == ["ant/alone.png", "ant/more/1.png", "bee/1.png"]
    assert opened(tmp_path / "set").labels == (0, 0, 1)


def test_a_folder_goes_by_its_own_name_where_a_link_leads_to_it_too(tmp_path: Path) -> None:
    picture(tmp_path / "ant" / "real" / "1.png")
    (tmp_path / "ant" / "a-link").symlink_to("real")
    assert names(tmp_path) == ["ant/real/1.png"]


@pytest.mark.parametrize("name", ["ant/gone.png", "ant/folder", "cat"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_links_that_lead_nowhere_are_named(tmp_path: Path, name: str, target: str) -> None:
    picture(tmp_path / "ant" / "1.png")
    link = tmp_path / name
    link.symlink_to(link if target == "itself" else tmp_path / "nowhere")
    with pytest.raises(DataError, match=rf"{link} is a link that leads nowhere \(.*\); put back"):
        opened(tmp_path)


def test_links_that_lead_nowhere_and_stand_for_no_picture_do_not_matter(tmp_path: Path) -> None:
    picture(tmp_path / "ant" / "1.png")
    (tmp_path / "ant" / "notes.txt").symlink_to("nowhere")
    (tmp_path / "ant" / ".lock").symlink_to("nowhere")
    assert names(tmp_path) == ["ant/1.png"]


# --- What is no file ---------------------------------------------------------------------------


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def make_link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


NO_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to a pipe": make_link_to_pipe,
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    picture(tmp_path / "ant" / "1.png")
    monkeypatch.chdir(tmp_path / "ant")  # a socket's whole path may have 107 bytes
    NO_FILES[kind](Path("2.png"))
    assert names(tmp_path) == ["ant/1.png"]
    assert opened(tmp_path).fingerprint


def test_a_folder_named_as_a_picture_is_a_folder(tmp_path: Path) -> None:
    picture(tmp_path / "ant" / "old.png" / "1.png")
    assert names(tmp_path) == ["ant/old.png/1.png"]


# --- Permissions -------------------------------------------------------------------------------


@pytest.mark.parametrize("unreadable", ["ant", "ant/deep", "."])
def test_a_folder_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unreadable: str
) -> None:
    picture(tmp_path / "ant" / "deep" / "1.png")
    picture(tmp_path / "bee" / "2.png")
    real = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path) == tmp_path / unreadable:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("os.scandir", refuse)
    folder = tmp_path / unreadable
    with pytest.raises(DataError, match=f"The image folder {folder} cannot be read: Permission"):
        opened(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_permissions_of_the_system_itself(tmp_path: Path, mode: int) -> None:
    picture(tmp_path / "ant" / "1.png")
    picture(tmp_path / "bee" / "2.png")
    (tmp_path / "ant").chmod(mode)
    try:
        with pytest.raises(DataError, match=r"cannot be read: Permission denied"):
            opened(tmp_path)
    finally:
        (tmp_path / "ant").chmod(0o755)


# --- Names that are no UTF-8 -------------------------------------------------------------------


def latin_folder(root: Path) -> str:
    images, labels = made_images(48)
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        place = root / ("a", "b", LATIN_1)[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{LATIN_1} {index:02}.png")
    return f"imagefolder:{root}"


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def test_names_that_are_no_utf_8_work_and_are_written_escaped(bench: Workbench) -> None:
    spec = latin_folder(bench.folder / "pictures")
    images = opened(bench.folder / "pictures")
    assert images.classes == ("a", "b", r"caf\xe9")
    assert images.name(0) == r"a/caf\xe9 00.png"
    result = bench.run("--rank", "conv1=1", "--rank", "conv2=1", "--no-refit", data=spec, test=spec)
    assert result.exit_code == 0, result.stderr
    test = bench.report()["result"]["test"]
    assert r"caf\xe9" in test["classes"]
    assert any(r"caf\xe9" in flip["name"] for flip in test["to_wrong"])
    for name in ("report.json", "report.html", "report.md"):
        assert r"caf\xe9" in (bench.output() / name).read_text(encoding="utf-8").replace(
            r"\\", "\\"
        )
    assert not any("\ud800" <= c <= "\udfff" for text in strings(bench.report()) for c in text)
    shown = command("report", str(bench.output()), "--json", "--junit", str(bench.output("j.xml")))
    assert json.loads(shown.stdout) == bench.report()


def test_a_damaged_picture_with_such_a_name_is_named(bench: Workbench) -> None:
    spec = latin_folder(bench.folder / "pictures")
    (bench.folder / "pictures" / LATIN_1 / f"{LATIN_1} 02.png").write_bytes(b"no picture")
    text = paragraph(bench.run("--rank", "conv2=4", data=spec), 3)
    assert r"caf\xe9/caf\xe9 02.png" in text


def test_the_same_pictures_by_another_path_have_the_same_fingerprint(tmp_path: Path) -> None:
    latin_folder(tmp_path / "pictures")
    (tmp_path / "link").symlink_to("pictures")
    first, second = opened(tmp_path / "pictures"), opened(tmp_path / "link")
    assert first.fingerprint == second.fingerprint


def test_a_folder_that_cannot_be_read_through_the_command_line(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = latin_folder(bench.folder / "pictures")
    real = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("os.scandir", refuse)
    text = paragraph(command("inspect", bench.checkpoint, "--model", SPEC, "--data", spec), 3)
    assert "pictures/b cannot be read: Permission denied" in text
