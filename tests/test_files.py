import errno
import hashlib
import os
import resource
import stat
from pathlib import Path

import pytest

from compress.errors import ArtefactError
from compress.files import atomic_folder, check_output, sha256_file, write_atomically


@pytest.fixture
def small_disk():
    """Files cannot grow beyond 4 KB, which is as near to a full disk as a test can get."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def entries(folder):
    return sorted(p.name for p in folder.iterdir())


def test_sha256_is_that_of_the_bytes(tmp_path):
    data = os.urandom(300_000)
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_write_replaces_and_keeps_plain_permissions(tmp_path):
    path, plain = tmp_path / "x.json", tmp_path / "plain"
    plain.write_text("")
    write_atomically(path, b"old")
    write_atomically(path, "grün")
    assert path.read_bytes() == "grün".encode()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert entries(tmp_path) == ["plain", "x.json"]


@pytest.mark.usefixtures("small_disk")
def test_write_that_does_not_fit_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    write_atomically(path, "old")
    with pytest.raises(ArtefactError, match="cannot be written: File too large; free some space"):
        write_atomically(path, b"n" * 10_000)
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["x"]


def test_write_into_a_missing_folder_says_so(tmp_path):
    with pytest.raises(ArtefactError, match=r"nowhere.x cannot be written: No such file"):
        write_atomically(tmp_path / "nowhere" / "x", "text")


def test_folder_appears_whole_with_its_parents(tmp_path):
    target = tmp_path / "a" / "b"
    with atomic_folder(target, force=False) as folder:
        (folder / "report.json").write_text("{}")
        assert not target.exists()
        assert folder.parent == target.parent
    assert entries(target) == ["report.json"]
    assert entries(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("problem", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_folder_vanishes_on_any_exception(tmp_path, problem):
    def fail():
        with atomic_folder(tmp_path / "a" / "b", force=False) as folder:
            (folder / "sub").mkdir()
            (folder / "model.safetensors").write_text("half")
            raise problem

    with pytest.raises(type(problem)):
        fail()
    assert entries(tmp_path) == []


def test_failed_replacement_leaves_the_old_result(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "model.safetensors").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with atomic_folder(target, force=True):
            raise KeyboardInterrupt
    assert (target / "model.safetensors").read_text() == "old"
    assert entries(tmp_path) == ["out"]


@pytest.mark.usefixtures("small_disk")
def test_folder_on_a_full_disk_is_an_artefact_error(tmp_path):
    with pytest.raises(ArtefactError, match="free some space"):
        with atomic_folder(tmp_path / "out", force=False) as folder:
            (folder / "model.safetensors").write_bytes(b"n" * 10_000)
    with pytest.raises(ArtefactError, match="free some space"):
        with atomic_folder(tmp_path / "out", force=False):
            # what safetensors raises
            raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert entries(tmp_path) == []


def test_errors_about_other_files_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError):
        with atomic_folder(tmp_path / "out", force=False):
            open(tmp_path / "elsewhere")  # noqa: SIM115


def test_unwritable_parent_is_an_artefact_error(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(ArtefactError, match="out cannot be written: Permission denied; check"):
        with atomic_folder(tmp_path / "out", force=False):
            pytest.fail("the block ran")


def test_only_a_finished_result_needs_force(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    check_output(target, force=False)
    (target / "report.json").write_text("{}")
    (target / "report.md").write_text("")
    check_output(target, force=False)  # the report of a failed run
    (target / "model.safetensors").write_text("")
    with pytest.raises(ArtefactError, match="already holds a result; pass --force"):
        check_output(target, force=False)
    with atomic_folder(target, force=True) as folder:
        (folder / "report.json").write_text("new")
    assert entries(target) == ["report.json"]
    assert entries(tmp_path) == ["out"]


def test_other_peoples_folders_are_never_replaced(tmp_path, monkeypatch):
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


def test_a_result_that_appeared_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "out"

    def race():
        with atomic_folder(target, force=False) as folder:
            (folder / "model.safetensors").write_text("ours")
            target.mkdir()
            (target / "model.safetensors").write_text("theirs")

    with pytest.raises(ArtefactError, match="already holds"):
        race()
    assert (target / "model.safetensors").read_text() == "theirs"
    assert entries(tmp_path) == ["out"]


def test_a_swap_that_fails_puts_the_old_result_back(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "model.safetensors").write_text("old")
    rename = Path.rename

    def refuse_the_new(self, to):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, to)

    monkeypatch.setattr("pathlib.Path.rename", refuse_the_new)
    with pytest.raises(ArtefactError, match="Input/output error"):
        with atomic_folder(target, force=True):
            pass
    assert (target / "model.safetensors").read_text() == "old"
    assert entries(tmp_path) == ["out"]
