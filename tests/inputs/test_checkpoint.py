from __future__ import annotations

import fractions
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import flipped
from safetensors.torch import save, save_file
from shared_data import shared_path
from torch import nn

from compress.errors import CheckpointError
from compress.inputs.checkpoint.loading import load_into
from compress.inputs.checkpoint.reading import read_checkpoint


class RunsCode:
    """A pickle that makes a folder when it is loaded carelessly."""

    def __init__(self, folder: Any) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def network(outputs: Any = 3) -> Any:
    torch.manual_seed(1)
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(1, 4, 3), bn=nn.BatchNorm2d(4), fc=nn.Linear(4, outputs))
    )


def prefixed(state: Any, prefix: Any) -> Any:
    return {prefix + name: tensor for name, tensor in state.items()}


STATE = network().state_dict()
FORMS = {
    "bare": (STATE, "", ""),
    "state_dict": ({"state_dict": STATE, "epoch": 3, "acc": torch.tensor(0.5)}, "state_dict", ""),
    "model": ({"model": STATE, "optimizer": {"state": {}}}, "model", ""),
    "model_state_dict": ({"model_state_dict": dict(STATE)}, "model_state_dict", ""),
    "ema": ({"ema": STATE}, "ema", ""),
    "nested": ({"model": {"state_dict": STATE}}, "model.state_dict", ""),
    "model before ema": ({"ema": prefixed(STATE, "x."), "model": STATE}, "model", ""),
    "parallel": ({"state_dict": prefixed(STATE, "module.")}, "state_dict", "module."),
    "compiled": (prefixed(STATE, "_orig_mod."), "", "_orig_mod."),
    "both": (prefixed(STATE, "_orig_mod.module."), "", "_orig_mod.module."),
    "lightning": ({"state_dict": prefixed(STATE, "model.")}, "state_dict", "model."),
    "averaged": ({"n_averaged": torch.tensor(7), **prefixed(STATE, "module.")}, "", "module."),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_entries(tmp_path: Path, form: Any, legacy: Any) -> None:
    content, container, prefix = FORMS[form]
    path = tmp_path / "weights.th"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    checkpoint = read_checkpoint(path)
    assert (checkpoint.container, checkpoint.prefix) == (container, prefix)
    assert checkpoint.state.keys() == STATE.keys()
    torch.testing.assert_close(checkpoint.state, dict(STATE), rtol=0, atol=0)
    assert len(checkpoint.sha256) == 64
    fresh = network()
    nn.init.zeros_(fresh.conv.weight)
    load_into(fresh, checkpoint)
    torch.testing.assert_close(fresh.state_dict(), STATE, rtol=0, atol=0)


def test_safetensors_whatever_its_name_and_metadata(tmp_path: Path) -> None:
    for name in ("a.safetensors", "a.bin"):
        save_file(prefixed(STATE, "module."), tmp_path / name, metadata={"format": "pt"})
        assert read_checkpoint(tmp_path / name).state.keys() == STATE.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_source_dtype_is_remembered(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "a.pt"
    torch.save({n: t.to(dtype) if n != "bn.bias" else t for n, t in STATE.items()}, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert checkpoint.state["conv.weight"].dtype == wide
    model = network()
    load_into(model, checkpoint)
    assert model.conv.weight.dtype == torch.float32
    expected = STATE["conv.weight"].to(dtype).float()
    torch.testing.assert_close(model.conv.weight.detach(), expected, rtol=0, atol=0)


def test_entries_that_are_no_tensors_are_reported(tmp_path: Path) -> None:
    torch.save({**STATE, "epoch": 3}, tmp_path / "a.pt")
    assert read_checkpoint(tmp_path / "a.pt").extras == ("epoch",)


def test_files_that_need_code_are_refused_and_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    path = tmp_path / "a.pt"
    cases = {
        "mkdir": {"state_dict": STATE, "x": RunsCode(trap)},
        "Conv2d|Sequential": network(),
        "Fraction": {"model": STATE, "rate": fractions.Fraction(1, 3)},
    }
    for name, content in cases.items():
        for zipped in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(CheckpointError, match=name) as caught:
                read_checkpoint(path)
            assert "nothing in it was run" in str(caught.value)
            assert "model.state_dict()" in str(caught.value)
    path.write_bytes(pickle.dumps(RunsCode(trap)))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(RunsCode(trap)))
    assert trap.exists(), "the trap itself must work for this test to mean anything"


def damaged_files() -> Any:
    zipped = save(STATE)
    yield "empty", b"", "is empty"
    yield "pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"
    yield "page", b"<!DOCTYPE html><html>404</html>", "holds text, neither"
    yield "noise", bytes(range(7, 250)) * 4, "unknown format"
    yield "half safetensors", zipped[: len(zipped) // 2], "truncated"
    yield "safetensors header alone", zipped[:40], "truncated"


@pytest.mark.parametrize(
    ("content", "message"), [pytest.param(c, m, id=n) for n, c, m in damaged_files()]
)
def test_damaged_files(tmp_path: Path, content: Any, message: Any) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_anywhere(tmp_path: Path, zipped: Any) -> None:
    path = tmp_path / "a.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for end in range(1, len(whole), 1 if len(whole) < 2000 else len(whole) // 500):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_no_flipped_bit_of_a_torch_archive_is_accepted(tmp_path: Path) -> None:
    """Of what its members hold; padding and dates between them are nobody's."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.linspace(1, 2, 5000), **STATE}, path)
    with zipfile.ZipFile(path) as archive:
        places = [(i.header_offset, i.file_size, i.filename) for i in archive.infolist()]
    whole = path.read_bytes()
    for offset, size, name in places:
        names, extra = (
            int.from_bytes(whole[offset + k : offset + k + 2], "little") for k in (26, 28)
        )
        start = offset + 30 + names + extra
        for _ in flipped(path, 40, start, start + size):
            with pytest.raises(CheckpointError, match=r"a\.pt .* truncated or damaged") as caught:
                read_checkpoint(path)
            assert name.rpartition("/")[2] in str(caught.value)
    assert read_checkpoint(path).state.keys() == {"w", *STATE}


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "a.pt").state.keys() == STATE.keys()


def _packed(source: Path, target: Path) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))


def test_members_that_expand_absurdly_are_refused(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"w": torch.zeros(100_000)}, plain)
    _packed(plain, packed)
    with pytest.raises(CheckpointError, match=r"b\.pt .*announces 400000 bytes in \d+, which no"):
        read_checkpoint(packed)
    torch.save(STATE, plain)
    _packed(plain, packed)
    assert read_checkpoint(packed).state.keys() == STATE.keys()


def test_members_are_checked_a_piece_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = []
    read = zipfile.ZipExtFile.read

    def noted(self: Any, n: Any = -1) -> bytes:
        pieces.append(n)
        return read(self, n)

    torch.save(STATE, tmp_path / "a.pt")
    monkeypatch.setattr(zipfile.ZipExtFile, "read", noted)
    read_checkpoint(tmp_path / "a.pt")
    assert pieces
    assert all(0 < n <= 1 << 20 for n in pieces)


def test_wrong_things_to_pass(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no\.pt cannot be read: No such file"):
        read_checkpoint(tmp_path / "no.pt")
    with pytest.raises(CheckpointError, match="is a folder; pass the file in it"):
        read_checkpoint(tmp_path)
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"compress": "{}"})
    with pytest.raises(CheckpointError, match=r"already compressed .*compress evaluate"):
        read_checkpoint(tmp_path / "model.safetensors")
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_checkpoint(tmp_path / "script.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "it holds epoch; pass a file"),
        ({}, "it holds nothing"),
        ({"net": STATE, "epoch": 3}, "with --checkpoint-key: net"),
        ([1, 2], "holds a list"),
        (torch.ones(2), "one bare tensor"),
        ({"w": torch.ones(2, 2).to_sparse()}, "quantised or sparse entries: w"),
    ],
)
def test_files_without_weights(tmp_path: Path, content: Any, message: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "a.pt")


def test_nan_entries_are_named_and_counted(tmp_path: Path) -> None:
    state = {f"w{k}": torch.full((2,), float("nan" if k % 2 else "inf")) for k in range(30)}
    torch.save({**state, "fine": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"w0, w1, .*w19, \.\.\. \(30 in all\)") as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert "w20" not in str(caught.value)
    assert "fine" not in str(caught.value)


def checkpoint_of(state: Any, tmp_path: Path) -> Any:
    torch.save(state, tmp_path / "c.pt")
    return read_checkpoint(tmp_path / "c.pt")


def test_differences_are_listed_and_the_model_is_unchanged(tmp_path: Path) -> None:
    state = dict(STATE)
    del state["conv.bias"]
    state["extra"] = torch.ones(1)
    state["bn.weight"] = torch.ones(5)
    model = network()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_into(model, checkpoint_of(state, tmp_path))
    message = str(caught.value)
    assert "missing from the checkpoint: conv.bias;" in message
    assert "unknown to the model: extra;" in message
    assert "bn.weight ([5] in the checkpoint, [4] in the model)" in message
    assert "num_classes" not in message
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_another_number_of_classes_is_recognised(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(network(10).state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match=r"fc has 10 classes, the model's 3: .*classes=10"):
        load_into(network(3), checkpoint)


def test_another_architecture_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No entry matches"):
        load_into(nn.Linear(1, 1), checkpoint_of(STATE, tmp_path))


def test_missing_batch_counters_are_tolerated(tmp_path: Path) -> None:
    state = {n: t for n, t in STATE.items() if "num_batches" not in n}
    model = network()
    nn.init.zeros_(model.conv.weight)
    load_into(model, checkpoint_of(state, tmp_path))
    torch.testing.assert_close(model.conv.weight.detach(), STATE["conv.weight"])


def test_stripped_prefixes_return_where_the_model_has_them(tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict(model=network()))
    state = prefixed(STATE, "module.model.")
    assert checkpoint_of(state, tmp_path).prefix == "module.model."
    nn.init.zeros_(model.model.conv.weight)
    load_into(model, checkpoint_of(state, tmp_path))
    torch.testing.assert_close(model.model.conv.weight.detach(), STATE["conv.weight"])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 3, bias=False)
        self.decode = nn.Linear(3, 3, bias=False)
        self.decode.weight = self.encode.weight


def test_tied_tensors_need_one_name_and_one_value(tmp_path: Path) -> None:
    weight = torch.arange(9.0).view(3, 3)
    model = Tied()
    load_into(model, checkpoint_of({"decode.weight": weight}, tmp_path))
    torch.testing.assert_close(model.encode.weight.detach(), weight)
    different = {"decode.weight": weight, "encode.weight": weight + 1}
    with pytest.raises(CheckpointError, match=r"ties encode\.weight and decode\.weight"):
        load_into(model, checkpoint_of(different, tmp_path))


def test_first_densenet_names_are_understood(tmp_path: Path) -> None:
    block = nn.Sequential(OrderedDict(norm1=nn.BatchNorm2d(2), conv2=nn.Conv2d(2, 2, 1)))
    model = nn.Sequential(OrderedDict(denselayer1=block))
    old = {
        n.replace("norm1", "norm.1").replace("conv2", "conv.2"): torch.rand_like(t)
        for n, t in model.state_dict().items()
        if t.is_floating_point()
    }
    load_into(model, checkpoint_of(old, tmp_path))
    torch.testing.assert_close(
        block.conv2.weight.detach(), old["denselayer1.conv.2.weight"], rtol=0, atol=0
    )


@pytest.mark.shared
def test_published_checkpoints_are_read() -> None:
    published = read_checkpoint(shared_path("checkpoints", "resnet20-12fca82f.th"))
    assert (published.container, published.prefix) == ("state_dict", "module.")
    tuned = read_checkpoint(shared_path("checkpoints", "resnet20-cifar10.safetensors"))
    learned = {n for n in tuned.state if "num_batches" not in n}
    assert published.state.keys() == learned


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_whole_and_complex_numbers_are_no_weights(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "weights.pt"
    torch.save({**STATE, "fc.weight": STATE["fc.weight"].to(dtype)}, path)
    model = network()
    with pytest.raises(CheckpointError, match=r"not a real number's: fc\.weight \("):
        load_into(model, read_checkpoint(path))
    assert torch.equal(model.fc.weight, STATE["fc.weight"])


def test_entries_without_values_are_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({**STATE, "fc.weight": STATE["fc.weight"].to("meta")}, path)
    with pytest.raises(CheckpointError, match=r"without values .*: fc\.weight"):
        read_checkpoint(path)
