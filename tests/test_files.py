from __future__ import annotations

import errno
import hashlib
import os
import re
import resource
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from damage import body_of
from interruptions import signalled
from safetensors import safe_open

from compress.errors import ArtefactError
from compress.files import (
    SEAL_KEY,
    SWEEP,
    BrokenSeal,
    atomic_folder,
    atomic_update,
    check_apart,
    check_output,
    check_tensors,
    sealed_record,
    sealed_tensors,
    sha256_file,
    unsealed_record,
    write_atomically,
)
from compress.files.exchange import exchange
from compress.files.leftovers import clear_leftovers


@pytest.fixture
def small_disk() -> Any:
    """Files cannot grow beyond 4 KB, which is as near to a full disk as a test can get."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def entries(folder: Any) -> Any:
    return sorted(p.name for p in folder.iterdir())


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = os.urandom(300_000)
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_write_replaces_and_keeps_plain_permissions(tmp_path: Path) -> None:
    path, plain = tmp_path / "x.json", tmp_path / "plain"
    plain.write_text("")
    write_atomically(path, b"old")
    write_atomically(path, "grün")
    assert path.read_bytes() == "grün".encode()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert entries(tmp_path) == ["plain", "x.json"]


@pytest.mark.usefixtures("small_disk")
def test_write_that_does_not_fit_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, "old")
    with pytest.raises(ArtefactError, match="cannot be written: File too large; free some space"):
        write_atomically(path, b"n" * 10_000)
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["x"]


def test_write_into_a_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"nowhere.x cannot be written: No such file"):
        write_atomically(tmp_path / "nowhere" / "x", "text")


def test_folder_appears_whole_with_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with atomic_folder(target, force=False) as folder:
        (folder / "report.json").write_text("{}")
        assert not target.exists()
        assert folder.parent == target.parent
    assert entries(target) == ["report.json"]
    assert entries(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("problem", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_folder_vanishes_on_any_exception(tmp_path: Path, problem: Any) -> None:
    def fail() -> None:
        with atomic_folder(tmp_path / "a" / "b", force=False) as folder:
            (folder / "sub").mkdir()
            (folder / "model.safetensors").write_text("half")
            raise problem

    with pytest.raises(type(problem)):
        fail()
    assert entries(tmp_path) == []


def test_failed_replacement_leaves_the_old_result(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "model.safetensors").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with atomic_folder(target, force=True):
            raise KeyboardInterrupt
    assert (target / "model.safetensors").read_text() == "old"
    assert entries(tmp_path) == ["out"]


@pytest.mark.usefixtures("small_disk")
def test_folder_on_a_full_disk_is_an_artefact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="free some space"):
        with atomic_folder(tmp_path / "out", force=False) as folder:
            (folder / "model.safetensors").write_bytes(b"n" * 10_000)
    with pytest.raises(ArtefactError, match="free some space"):
        with atomic_folder(tmp_path / "out", force=False):
            # what safetensors raises
            raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert entries(tmp_path) == []


def test_errors_about_other_files_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        with atomic_folder(tmp_path / "out", force=False):
            open(tmp_path / "elsewhere")  # noqa: SIM115


def test_unwritable_parent_is_an_artefact_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(ArtefactError, match="out cannot be written: Permission denied; check"):
        with atomic_folder(tmp_path / "out", force=False):
            pytest.fail("the block ran")


def test_only_a_finished_result_needs_force(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    check_output(target, force=False)
    for name in ("report.json", "report.md", "report.html", "plan.json", "config.toml"):
        (target / name).write_text("{}")
    check_output(target, force=False)  # the report of a failed run
    (target / "model.safetensors").write_text("")
    with pytest.raises(ArtefactError, match="already holds a result; pass --force"):
        check_output(target, force=False)
    with atomic_folder(target, force=True) as folder:
        (folder / "report.json").write_text("new")
    assert entries(target) == ["report.json"]
    assert entries(tmp_path) == ["out"]


def test_other_peoples_folders_are_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ArtefactError, match=r"holds thesis\.tex"):
        check_output(tmp_path, force=True)
    with pytest.raises(ArtefactError, match="is a file"):
        check_output(tmp_path / "thesis.tex", force=True)
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for folder in (".", ".."):
        with pytest.raises(ArtefactError, match="working folder"):
            check_output(folder, force=True)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ArtefactError, match="link to nothing"):
        check_output(tmp_path / "link", force=True)


def test_a_result_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def race() -> None:
        with atomic_folder(target, force=False) as folder:
            (folder / "model.safetensors").write_text("ours")
            target.mkdir()
            (target / "model.safetensors").write_text("theirs")

    with pytest.raises(ArtefactError, match="already holds"):
        race()
    assert (target / "model.safetensors").read_text() == "theirs"
    assert entries(tmp_path) == ["out"]


def no_exchange(*_: Any) -> Any:
    """A file system that cannot exchange two names."""
    return False


def test_a_swap_that_fails_puts_the_old_result_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "model.safetensors").write_text("old")
    rename = Path.rename

    def refuse_the_new(self: Any, to: Any) -> Any:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, to)

    monkeypatch.setattr("compress.files.atomic.exchange", no_exchange)
    monkeypatch.setattr("pathlib.Path.rename", refuse_the_new)
    with pytest.raises(ArtefactError, match="Input/output error"):
        with atomic_folder(target, force=True):
            pass
    assert (target / "model.safetensors").read_text() == "old"
    assert entries(tmp_path) == ["out"]


def test_names_trade_places_in_one_step(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "x").write_text("one")
    second.mkdir()
    (second / "x").write_text("two")
    if not exchange(first, second):
        pytest.skip("this file system cannot exchange names")
    assert (first / "x").read_text() == "two"
    assert (second / "x").read_text() == "one"
    with pytest.raises(FileNotFoundError):
        exchange(first, tmp_path / "none")


def test_a_finished_sweep_is_not_a_failed_run(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    for name in ("report.json", "report.md", "report.html", "config.toml", "sweep.csv"):
        (target / name).write_text("{}")
    for force in (False, True):
        with pytest.raises(ArtefactError, match=r"holds sweep\.csv, which would be lost"):
            check_output(target, force=force)
    check_output(target, force=True, kind=SWEEP)
    with pytest.raises(ArtefactError, match="already holds a sweep; pass --resume"):
        check_output(target, force=False, kind=SWEEP)


@pytest.mark.parametrize(
    "name", ["report.pdf", "report.docx", "sweep.xlsx", "report.d/notes", "model.safetensors/x"]
)
def test_files_with_names_like_ours_are_somebodys(tmp_path: Path, name: Any) -> None:
    target = tmp_path / "out"
    (target / name).parent.mkdir(parents=True)
    (target / name).write_text("years")
    with pytest.raises(ArtefactError, match=re.escape(name.split("/")[0])):
        check_output(target, force=True)


def test_somebodys_file_in_the_chosen_result_of_a_sweep_is_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "chosen").mkdir(parents=True)
    (target / "chosen" / "model.safetensors").write_text("")
    check_output(target, force=True, kind=SWEEP)
    (target / "chosen" / "notes.txt").write_text("years")
    with pytest.raises(ArtefactError, match=r"holds chosen/notes\.txt"):
        check_output(target, force=True, kind=SWEEP)


def test_long_names_are_refused_before_the_work(tmp_path: Path) -> None:
    check_output(tmp_path / ("n" * 237), force=False)
    with pytest.raises(ArtefactError, match=r"has 240 bytes.*at most 237; pass a shorter one"):
        check_output(tmp_path / ("n" * 240), force=False)
    with atomic_folder(tmp_path / ("n" * 237), force=False):
        pass


def test_an_output_inside_an_input_folder_is_refused(tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "cat").mkdir(parents=True)
    with pytest.raises(ArtefactError, match="would read it as data"):
        check_apart(images / "result", [images], [images])
    with pytest.raises(ArtefactError, match="would replace the input"):
        check_apart(tmp_path, [images], [images])
    check_apart(tmp_path / "result", [images], [images])


def test_an_update_keeps_what_else_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "inner").mkdir(parents=True)
    (folder / "model").write_bytes(b"large")
    (folder / "inner" / "kept").write_text("kept")
    (folder / "report").write_text("old")

    def fail() -> None:
        with atomic_update(folder) as new:
            write_atomically(new / "report", "new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (folder / "report").read_text() == "old"
    with atomic_update(folder) as new:
        write_atomically(new / "report", "new")
    assert (folder / "report").read_text() == "new"
    assert (folder / "model").read_bytes() == b"large"
    assert (folder / "inner" / "kept").read_text() == "kept"
    assert entries(tmp_path) == ["out"]


# --- Killed at every change of a file ------------------------------------------------------------


def replace_folder(folder: Any) -> None:
    with atomic_folder(folder / "out", force=True) as new:
        write_atomically(new / "model.safetensors", "new")
        write_atomically(new / "report.json", "new")


def update_folder(folder: Any) -> None:
    with atomic_update(folder / "out") as new:
        write_atomically(new / "model.safetensors", "new")
        write_atomically(new / "report.json", "new")


def write_file(folder: Any) -> None:
    write_atomically(folder / "out" / "report.json", "new")


def make_old(folder: Any) -> None:
    (folder / "out").mkdir()
    for name in ("model.safetensors", "report.json"):
        (folder / "out" / name).write_text("old")


def contents(folder: Any) -> Any:
    out = folder / "out"
    return {name: (out / name).read_text() for name in entries(out)} if out.exists() else None


@pytest.mark.parametrize(
    ("sent", "again"),
    [(signal.SIGKILL, False), (signal.SIGINT, False), (signal.SIGINT, True)],
    ids=["killed", "Ctrl-C", "impatient Ctrl-C"],
)
@pytest.mark.parametrize("exchanging", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("work", [replace_folder, update_folder, write_file])
def test_a_signal_at_any_change_leaves_the_old_or_the_new(
    tmp_path: Path, work: Any, exchanging: Any, sent: Any, again: Any
) -> None:
    """The process gets the signal just before its n-th change of a file, for every n.

    An impatient user sends it before every later change too, while the first one's clean-up runs.
    """
    reached, n = True, 0
    outcomes = set()
    while reached:
        folder = tmp_path / str(n)
        folder.mkdir()
        make_old(folder)
        with pytest.MonkeyPatch.context() as patch:
            if not exchanging:
                patch.setattr("compress.files.atomic.exchange", no_exchange)
            reached = signalled(lambda folder=folder: work(folder), folder, n, sent, again=again)
        old = {"model.safetensors": "old", "report.json": "old"}
        new = old | {"report.json": "new"} if work is write_file else dict.fromkeys(old, "new")
        left = [e for e in entries(folder / "out") if e.startswith(".")] if contents(folder) else []
        found = {k: v for k, v in (contents(folder) or {}).items() if not k.startswith(".")}
        if found or exchanging:  # between two renames only the next to write there sees it
            assert found in (old, new), (n, found)
        if sent == signal.SIGINT:
            assert entries(folder) == ["out"], (n, entries(folder))
            assert left == []
            assert found in (old, new)
        clear_leftovers(folder / "out")
        clear_leftovers(folder / "out" / "report.json")
        assert contents(folder) in (old, new), n
        assert entries(folder) == ["out"], (n, entries(folder))
        outcomes.add(found == new)
        n += 1
    assert outcomes == {True, False}
    assert n > 4


def test_what_another_process_is_writing_is_not_cleared(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out", force=False) as new:
        write_atomically(new / "report.json", "mine")
        clear_leftovers(tmp_path / "out")  # another descriptor, as another process would have
        assert (new / "report.json").read_text() == "mine"
    assert entries(tmp_path) == ["out"]


def test_what_is_not_ours_is_not_cleared(tmp_path: Path) -> None:
    for name in (".out.partial", ".out.1234567g.partial", ".other.12345678.partial", "out.old"):
        (tmp_path / name).write_text("somebody's")
    (tmp_path / ".out.12345678.old").symlink_to(tmp_path / "out.old")
    before = entries(tmp_path)
    clear_leftovers(tmp_path / "out")
    assert entries(tmp_path) == before


# --- Digests -----------------------------------------------------------------------------------


def test_sealed_tensors_are_read_as_what_they_were(tmp_path: Path) -> None:
    """Names of any letters, shapes of no numbers, and metadata in the order given."""
    path = tmp_path / "a.safetensors"
    tensors = {"grün|1": torch.arange(5.0), "": torch.zeros(0, 3), "half": torch.ones(1).half()}
    metadata = {"zeta": '{"ä": 1}', "alpha": ""}
    write_atomically(path, sealed_tensors(safetensors.torch.save(tensors), metadata))
    check_tensors(path)
    found = safetensors.torch.load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as opened:
        carried = opened.metadata()
    assert {name: carried[name] for name in metadata} == metadata
    header = path.read_bytes()[8 : body_of(path)]
    assert header.index(b"zeta") < header.index(b"alpha") < header.index(SEAL_KEY.encode())


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 16, b"\2\0\0\0\0\0\0\0{}", b"\0" * 64])
def test_what_is_no_sealed_file_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(BrokenSeal):
        check_tensors(tmp_path / "a")


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    record = sealed_record({"a": 1, "b": [0.1, {"d": None, "c": (1, 2)}]})
    turned = dict(reversed(record.items()))
    assert unsealed_record(turned) == {"a": 1, "b": [0.1, {"d": None, "c": [1, 2]}]}
    edited: list[Any] = [{**record, "a": 2}, {**record, "e": 1}, {**record, "sha256": 1}]
    for wrong in (*edited, [], None):
        with pytest.raises(BrokenSeal, match="damaged or edited"):
            unsealed_record(wrong)
    with pytest.raises(BrokenSeal, match="no digest"):
        unsealed_record({"a": 1})
