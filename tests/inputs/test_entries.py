"""Which entries of a checkpoint are read: keys, prefixes, several files, what lies beside."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import pickle
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from workbench import SPEC, Workbench, command, paragraph

from compress.artefact.manifest import is_artefact
from compress.errors import CheckpointError
from compress.inputs.checkpoint import Pick, load_into, read_checkpoint
from compress.inputs.checkpoint.inert import STAND_INS
from compress.inputs.checkpoint.reading import checkpoint_sha256


def network(seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 4, 3), fc=nn.Linear(4, 3)))


def prefixed(state: Any, prefix: str) -> Any:
    return {prefix + name: tensor for name, tensor in state.items()}


ONE, OTHER = network(1).state_dict(), network(2).state_dict()


def is_one(state: Any) -> bool:
    return state.keys() == ONE.keys() and all(torch.equal(state[n], ONE[n]) for n in ONE)


def is_other(state: Any) -> bool:
    return state.keys() == OTHER.keys() and all(torch.equal(state[n], OTHER[n]) for n in OTHER)


def saved(folder: Path, content: Any, name: str = "a.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"model": OTHER, "ema": ONE}, "ema"),
        ({"params": OTHER, "params_ema": ONE}, "params_ema"),
        ({"model": OTHER, "nets": {"teacher": {"state_dict": ONE}}}, "nets.teacher.state_dict"),
        ({"model": OTHER, "nets": {"teacher": {"state_dict": ONE}}}, "nets.teacher"),
        ({"model": OTHER, "a.b": {"c": prefixed(ONE, "module.")}}, "a.b.c"),
    ],
)
def test_a_key_picks_one_of_several_state_dicts(tmp_path: Path, content: Any, key: str) -> None:
    assert is_one(read_checkpoint(saved(tmp_path, content), Pick(key)).state)


def test_without_a_key_the_usual_place_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path, {"ema": OTHER, "model": ONE, "nets": {"x": dict(OTHER)}})
    found = read_checkpoint(path)
    assert is_one(found.state)
    assert found.container == "model"
    assert found.others == ("ema", "nets.x")
    with pytest.raises(CheckpointError, match=r"under 'model' was read; choose another with "
                       r"--checkpoint-key: ema, nets\.x"):  # fmt: skip
        load_into(nn.Linear(2, 2), found)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("emma", r"nothing under the key 'emma'\. Did you mean 'ema'\? .*under ema, model"),
        ("epoch", "no weights under the key 'epoch'"),
        ("model.conv", "nothing under the key"),
        ("optimizer", "no weights under the key"),
    ],
)
def test_a_wrong_key(tmp_path: Path, key: str, message: str) -> None:
    optimiser = torch.optim.Adam(network().parameters()).state_dict()
    content = {"ema": ONE, "model": OTHER, "epoch": 3, "optimizer": optimiser}
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(saved(tmp_path, content), Pick(key))


def test_a_key_in_a_file_of_one_state_dict(tmp_path: Path) -> None:
    save_file(dict(ONE), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="no key: its entries are the weights themselves"):
        read_checkpoint(tmp_path / "a.safetensors", Pick("ema"))


@pytest.mark.parametrize("prefix", ["student.", "student"])
@pytest.mark.parametrize("front", ["", "module."])
def test_a_prefix_takes_its_entries_alone(tmp_path: Path, prefix: str, front: str) -> None:
    both = prefixed(ONE, f"{front}student.") | prefixed(OTHER, f"{front}teacher.")
    found = read_checkpoint(saved(tmp_path, {"state_dict": both}), Pick(prefix=prefix))
    assert is_one(found.state)


def test_a_wrong_prefix(tmp_path: Path) -> None:
    both = prefixed(ONE, "student.") | prefixed(OTHER, "teacher.")
    path = saved(tmp_path, both)
    message = r"begins with 'studnt\.'\. Did you mean 'student\.'\? .*with student\., teacher\."
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path, Pick(prefix="studnt"))
    with pytest.raises(CheckpointError, match=r"begin with 'student\.' fit: pass --prefix student"):
        load_into(network(), read_checkpoint(path))


def test_what_was_picked_is_part_of_the_hash(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": OTHER, "ema": ONE})
    picks = (Pick(), Pick("model"), Pick("ema"), Pick(prefix="ema"))
    hashes = [checkpoint_sha256(path, pick) for pick in picks]
    assert len(set(hashes)) == len(hashes)
    assert hashes[2] == read_checkpoint(path, Pick("ema")).sha256


class Wrapper(nn.Module):
    """Holds a network under some dotted name."""

    def __init__(self, place: str, extra: bool = False) -> None:
        super().__init__()
        head, _, rest = place.partition(".")
        setattr(self, head, Wrapper(rest) if rest else network(5))
        if extra:
            self.head = nn.Linear(3, 2)


@pytest.mark.parametrize("place", ["net", "backbone", "model", "backbone.body", "a.b.c"])
@pytest.mark.parametrize("front", ["", "module.", "model."])
def test_a_wrappers_prefix_is_added(tmp_path: Path, place: str, front: str) -> None:
    model = Wrapper(place)
    load_into(model, read_checkpoint(saved(tmp_path, prefixed(ONE, front))))
    assert is_one(model.get_submodule(place).state_dict())


def test_a_part_of_the_prefix_may_be_there(tmp_path: Path) -> None:
    model = Wrapper("backbone.body")
    load_into(model, read_checkpoint(saved(tmp_path, prefixed(ONE, "body."))))
    assert is_one(model.get_submodule("backbone.body").state_dict())


def test_a_prefix_that_is_not_common_is_not_added(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unknown to the model: conv\.weight"):
        load_into(Wrapper("net", extra=True), read_checkpoint(saved(tmp_path, ONE)))


# --- Several files -----------------------------------------------------------------------------


def shards(folder: Path, **changes: Any) -> Path:
    """A checkpoint in two files with its index; changes go to the index."""
    save_file({n: ONE[n] for n in list(ONE)[:2]}, folder / "model-1.safetensors")
    save_file({n: ONE[n] for n in list(ONE)[2:]}, folder / "model-2.safetensors")
    places = {n: f"model-{1 + k // 2}.safetensors" for k, n in enumerate(ONE)}
    places = {n: v for n, v in (places | changes).items() if v is not None}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return path


def test_an_index_and_its_folder(tmp_path: Path) -> None:
    path = shards(tmp_path)
    for place in (path, tmp_path):
        found = read_checkpoint(place)
        assert is_one(found.state)
        assert found.sha256 == checkpoint_sha256(tmp_path)
    assert not is_artefact(tmp_path)


def test_links_to_files_elsewhere_are_followed(tmp_path: Path) -> None:
    """As in the cache of a hub."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    path = shards(tmp_path / "snapshot")
    shard = tmp_path / "snapshot" / "model-1.safetensors"
    shard.rename(tmp_path / "blobs" / "abc")
    shard.symlink_to(Path("..", "blobs", "abc"))
    assert is_one(read_checkpoint(path).state)


@pytest.mark.parametrize("name", ["model-1.safetensors", "model-2.safetensors"])
def test_the_hash_covers_every_file(tmp_path: Path, name: str) -> None:
    path = shards(tmp_path)
    before = checkpoint_sha256(path)
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    assert checkpoint_sha256(path) != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc.bias": "model-3.safetensors"}, r"names model-3\.safetensors, which is not beside"),
        ({"fc.bias": "../model-2.safetensors"}, "places 'fc.bias' in '../model-2.safetensors'"),
        ({"fc.bias": "/etc/passwd"}, "which is not the name of a file beside it"),
        ({"fc.bias": "a\\b"}, "not the name of a file beside it"),
        ({"fc.bias": ".."}, "not the name of a file beside it"),
        ({"fc.bias": 3}, "not the name of a file beside it"),
        ({"fc.bias": "model-1.safetensors"}, r"says that model-1\.safetensors holds fc\.bias, and"),
        ({"fc.scale": "model-1.safetensors"}, r"holds fc\.scale, and it does not"),
        ({"fc.bias": None}, r"model-2\.safetensors holds fc\.bias, which the index"),
    ],
)
def test_an_index_that_is_wrong(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(shards(tmp_path, **changes))


def test_an_entry_in_two_files(tmp_path: Path) -> None:
    path = shards(tmp_path)
    save_file(dict(ONE), tmp_path / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors holds conv.*has elsewhere"):
        read_checkpoint(path)


@pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": 3}', "{", ""])
def test_json_that_is_no_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"a\.json (is no index|is damaged)"):
        read_checkpoint(tmp_path / "a.json")


# --- What lies beside the weights --------------------------------------------------------------

BESIDE = {
    "float": np.float64(0.93),
    "int": np.int64(7),
    "bool": np.bool_(True),
    "text": np.str_("best"),
    "dtype": np.dtype("float32"),
    "array": np.linspace(0, 1, 5),
    "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("x"), best=np.float32(1)),
    "simple": types.SimpleNamespace(a=1),
    "path": pathlib.Path("runs"),
    "ordered": OrderedDict(a=1),
    "size": torch.Size([1, 2]),
    "set": {1, 2},
    "optimizer": torch.optim.Adam(network().parameters()).state_dict(),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", BESIDE)
def test_values_beside_the_weights_are_passed_over(tmp_path: Path, name: str, legacy: bool) -> None:
    path = tmp_path / "a.pt"
    content = {"state_dict": ONE, name: BESIDE[name]}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert is_one(read_checkpoint(path).state)
    bare = {**ONE, name: BESIDE[name]}
    torch.save(bare, path, _use_new_zipfile_serialization=not legacy)
    if name != "optimizer":
        assert read_checkpoint(path).extras == (name,)


def test_names_of_numpy_1_are_known_as_well(tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": ONE, "best": np.float64(0.5)})
    names = {f"{c.__module__}.{c.__qualname__}" for c in STAND_INS}
    assert {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"} <= names
    assert is_one(read_checkpoint(path).state)


def test_nothing_stays_allowed_and_nothing_is_called(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    path = saved(tmp_path, {"state_dict": ONE, "best": np.float64(0.5)})
    read_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


class Asks:
    """Pickled as a call that takes memory when it is made in earnest."""

    def __reduce__(self) -> Any:
        return np.dtype, ("V9000000000",)


def test_a_huge_type_is_not_made(tmp_path: Path) -> None:
    assert is_one(read_checkpoint(saved(tmp_path, {"state_dict": ONE, "x": Asks()})).state)


class Opens:
    """Pickled as a call that is not passed over."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_inside_a_namespace_is_still_refused(tmp_path: Path) -> None:
    args = argparse.Namespace(trap=Opens(tmp_path / "sprung"))
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        read_checkpoint(saved(tmp_path, {"state_dict": ONE, "args": args}))
    assert not (tmp_path / "sprung").exists()


# --- Commands ----------------------------------------------------------------------------------


def test_results_remember_what_was_picked(bench: Workbench) -> None:
    state = load_file(bench.checkpoint)
    noise = {n: torch.randn_like(t) if t.is_floating_point() else t for n, t in state.items()}
    path = bench.folder / "training.pt"
    both = prefixed(state, "student.") | prefixed(noise, "teacher.")
    torch.save({"model": noise, "ema": both}, path)
    out = str(bench.output("picked"))
    done = command(
        "run", str(path), "--model", SPEC, "--data", bench.train, "--test", bench.test,
        "--rank", "conv2=4", "--no-refit", "--checkpoint-key", "ema", "--prefix", "student",
        "--output", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    again = ("verify", out, "--checkpoint", str(path), "--model", SPEC, "--test", bench.test)
    assert command(*again).exit_code == 0
    other = command(*again, "--prefix", "teacher")
    assert "was made from the checkpoint with SHA-256" in paragraph(other, 3)
    wrong = command("inspect", str(path), "--model", SPEC, "--checkpoint-key", "emma")
    assert "Did you mean 'ema'" in paragraph(wrong, 3)
