"""The artefact: what is loaded is what was saved, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from damage import body_of, flipped, metadata_of, resealed, write_sealed
from networks.tiny import tiny
from stopwatch import stop_the_clock
from torch import Tensor, nn
from workbench import SPEC, made_images

import compress
from compress.artefact.manifest import Manifest, read_manifest
from compress.artefact.model import load, save
from compress.artefact.runtime import Runtime, write_runtime
from compress.errors import ArtefactError, CheckpointError
from compress.inputs.checkpoint.reading import read_checkpoint

EXAMPLE = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def images(count: int = 24) -> tuple[Tensor, Tensor]:
    pixels, labels = made_images(count)
    return torch.tensor(pixels).unsqueeze(1).float() / 255, torch.tensor(labels)


def compressed(model: nn.Module, folder: Path, **given: Any) -> tuple[Path, nn.Module]:
    """Compress a model at rank 2 wherever that is possible; return the file and the model."""
    settings = {"spec": "", "rank": {"*": "2"}, "force_rank": True, "metric": "mse", **given}
    made = compress.compress_model(model, images(), **settings)
    file = folder / "model.safetensors"
    save(made.model, made.manifest, file)
    return file, made.model


@pytest.fixture(autouse=True)
def no_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_the_clock(monkeypatch)


@pytest.fixture
def result(tmp_path: Path) -> tuple[Path, nn.Module]:
    return compressed(tiny(), tmp_path, spec=SPEC)


def equal(model: nn.Module, loaded: nn.Module) -> None:
    own, found = model.state_dict(), loaded.state_dict()
    assert own.keys() == found.keys()
    assert all(torch.equal(own[k], found[k]) and own[k].dtype == found[k].dtype for k in own)
    example = EXAMPLE.to(next(model.parameters()))
    with torch.no_grad():
        assert torch.equal(model(example), loaded(example))


def test_saved_and_loaded_models_are_equal_and_plain(result: tuple[Path, nn.Module]) -> None:
    file, model = result
    for loaded in (
        load(file, trust_code=True),
        load(file, model=tiny()),
        load(file.parent, tiny()),
    ):
        equal(model, loaded)
        assert not loaded.training
        assert all(
            type(m).__module__.startswith("torch.nn") for n, m in loaded.named_modules() if n
        )


@pytest.mark.parametrize(
    ("last", "wins"), [(0.004, True), (0.0058, False), (0.009, False)], ids=str
)
def test_the_faster_memory_format_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: float, wins: bool
) -> None:
    """By a clear margin alone; the saved bytes are contiguous either way."""
    stop_the_clock(
        monkeypatch, dense=0.01, dense_channels_last=0.008, compressed=0.006,
        compressed_channels_last=last,
    )  # fmt: skip
    settings = {"spec": SPEC, "rank": {"*": "2"}, "force_rank": True, "metric": "mse"}
    made = compress.compress_model(tiny(), images(), **settings)
    cost = made.result.cost
    assert (cost.memory_format == "channels_last") == wins
    assert {x.dense_memory_format for x in cost.latency} == {"channels_last"}
    assert [x.ratio for x in cost.latency] == [pytest.approx((last if wins else 0.006) / 0.008)] * 2
    save(made.model, made.manifest, tmp_path / "model.safetensors")
    write_runtime(tmp_path, Runtime(cost.memory_format))
    loaded = load(tmp_path, model=tiny())
    equal(made.model, loaded)
    strides = {
        tuple(p.stride()) for p in loaded.parameters() if p.dim() == 4 and p[0, 0].numel() > 1
    }
    assert {s[1] == 1 for s in strides} == {wins}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting"),
        ("[]", "no format 1"),
        ('{"format": 2, "memory_format": "channels_last"}', "no format 1"),
        ('{"format": 1}', "memory_format is none of contiguous, channels_last"),
        ('{"format": 1, "memory_format": ["channels_last"]}', "memory_format is none of"),
    ],
)
def test_without_what_was_timed_a_model_is_contiguous(
    result: tuple[Path, nn.Module], content: str, reason: str
) -> None:
    file, model = result
    equal(model, load(file, model=tiny()))
    file.with_name("runtime.json").write_text(content)
    with pytest.warns(UserWarning, match=rf"runtime\.json cannot be used \(.*{reason}"):
        loaded = load(file, model=tiny())
    equal(model, loaded)
    assert all(p.is_contiguous() for p in loaded.parameters())


def test_a_users_code_runs_only_when_trusted(result: tuple[Path, nn.Module]) -> None:
    with pytest.raises(ArtefactError, match="trust_code=True"):
        load(result[0])


class Shared(nn.Module):
    """One layer used twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.middle
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.middle(torch.relu(self.first(x))))
        return self.head(torch.relu(self.again(x)).mean((2, 3)))


def test_shared_layers_stay_shared(tmp_path: Path) -> None:
    file, model = compressed(Shared(), tmp_path)
    loaded = load(file, model=Shared())
    equal(model, loaded)
    assert loaded.middle is loaded.again
    assert isinstance(loaded.middle, nn.Sequential)
    names = set(safetensors.torch.load_file(file))
    assert not {n.replace("middle", "again") for n in names if n.startswith("middle")} & names


class Tied(nn.Module):
    """Two layers with one weight, which a rewrite would untie."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).mean((2, 3))
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def test_tied_weights_are_kept_tied_and_stored_once(tmp_path: Path) -> None:
    file, model = compressed(Tied(), tmp_path)
    loaded = load(file, model=Tied())
    equal(model, loaded)
    assert loaded.first.weight is loaded.second.weight
    stored = safetensors.torch.load_file(file)
    assert [name for name in stored if stored[name].shape == (6, 6)] == ["first.weight"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_of_the_source_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    file, model = compressed(tiny().to(dtype), tmp_path)
    assert {p.dtype for p in model.parameters()} == {dtype}
    equal(model, load(file, model=tiny()))


def test_a_model_that_is_one_layer(tmp_path: Path) -> None:
    layer = nn.Linear(8, 5)
    made = compress.compress_model(
        layer, torch.rand(40, 8), rank={"*": "2"}, metric="mse", force_rank=True
    )
    file = tmp_path / "model.safetensors"
    save(made.model, made.manifest, file)
    loaded = load(file, model=nn.Linear(8, 5))
    assert isinstance(loaded, nn.Sequential)
    example = torch.rand(3, 8)
    with torch.no_grad():
        assert torch.equal(loaded(example), made.model(example))


def test_equal_inputs_give_equal_bytes_whatever_was_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = tiny()
    files = []
    for name, last in (("a", 0.02), ("b", 0.002)):
        stop_the_clock(monkeypatch, compressed=0.01, compressed_channels_last=last)
        (tmp_path / name).mkdir()
        files.append(compressed(model, tmp_path / name, energy=0.9, rank={})[0].read_bytes())
    assert files[0] == files[1]


# --- Damage ------------------------------------------------------------------------------------


def test_no_flipped_bit_is_accepted(result: tuple[Path, nn.Module]) -> None:
    """In the header as in the tensors, by any way to read a result."""
    file, model = result
    for start, stop in ((0, body_of(file)), (body_of(file), None)):
        for byte in flipped(file, 300, start, stop):
            with pytest.raises(ArtefactError, match=r"model\.safetensors.*damaged"):
                load(file, model=tiny())
            with pytest.raises(ArtefactError, match="damaged"):
                read_manifest(file)
            with pytest.raises(CheckpointError):
                read_checkpoint(file)
            assert byte >= start
    equal(model, load(file, model=tiny()))


def test_edited_weights_are_refused(result: tuple[Path, nn.Module]) -> None:
    file, _ = result
    tensors = safetensors.torch.load_file(file)
    tensors["head.1.bias"] = -tensors["head.1.bias"]
    safetensors.torch.save_file(tensors, file, metadata_of(file))
    with pytest.raises(ArtefactError, match=r"model\.safetensors was damaged or edited since"):
        load(file, model=tiny())


def test_a_manifest_edited_by_hand_is_refused(result: tuple[Path, nn.Module]) -> None:
    file, _ = result
    tensors, metadata = safetensors.torch.load_file(file), metadata_of(file)
    manifest = json.loads(metadata["compress"])
    manifest["verified"] = {"top1_after": 1.0}
    safetensors.torch.save_file(tensors, file, {**metadata, "compress": json.dumps(manifest)})
    for read in (read_manifest, lambda path: load(path, model=tiny())):
        with pytest.raises(ArtefactError, match="damaged or edited since it was written"):
            read(file)


def test_results_without_a_digest_are_refused(result: tuple[Path, nn.Module]) -> None:
    file, _ = result
    tensors, manifest = safetensors.torch.load_file(file), metadata_of(file)["compress"]
    safetensors.torch.save_file(tensors, file, {"compress": manifest})
    with pytest.raises(ArtefactError, match=r"carries no digest.*run `compress run` again"):
        load(file, model=tiny())
    old = json.dumps({**json.loads(manifest), "format": 1})
    safetensors.torch.save_file(tensors, file, {"compress": old})
    with pytest.raises(ArtefactError, match=r"format 1.*run `compress run` again"):
        load(file, model=tiny())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    file, model = compressed(tiny().to(dtype), tmp_path)
    manifest, tensors = read_manifest(file), safetensors.torch.load_file(file)
    head = model.get_submodule("head.1")
    with torch.no_grad():
        head.bias[0] = value
    before = file.read_bytes()
    with pytest.raises(ArtefactError, match=r"NaN or infinite values in head\.1\.bias"):
        save(model, manifest, file)
    assert file.read_bytes() == before
    # As if a program had written it none the less.
    tensors["head.1.bias"][0] = value
    write_sealed(file, tensors, {"compress": manifest.to_json()})
    with pytest.raises(ArtefactError, match=r"NaN or infinite values in head\.1\.bias"):
        load(file, model=tiny())


class Masked(nn.Module):
    """A network with infinite and undefined numbers among its buffers, on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny()
        self.register_buffer("mask", torch.tensor([0.0, -math.inf, 0.0]))
        self.register_buffer("unset", torch.full((2,), math.nan))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.mask.clamp(min=-1.0)


def test_what_was_not_finite_in_the_original_may_be_so(tmp_path: Path) -> None:
    settings = {"rank": {"*": "2"}, "force_rank": True, "metric": "mse"}
    made = compress.compress_model(
        Masked(), images(), spec="", output=str(tmp_path / "out"), **settings
    )
    assert made.manifest.not_finite == ("unset",)
    loaded = load(tmp_path / "out", model=Masked())
    assert torch.equal(loaded.mask, torch.tensor([0.0, -math.inf, 0.0]))
    assert loaded.unset.isnan().all()


def test_the_manifest_is_read_back(result: tuple[Path, nn.Module]) -> None:
    manifest = read_manifest(result[0])
    assert manifest.model == SPEC
    assert [r.name for r in manifest.replacements] == ["conv1", "conv2", "head"]
    assert manifest.folded == (("conv1", "norm"),)
    assert json.loads(manifest.to_json()) == json.loads(json.dumps(dataclasses.asdict(manifest)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=99), "has format 99"),
        (lambda m: m.update(format="1"), "damaged"),
        (lambda m: m.pop("replacements"), "damaged"),
        (lambda m: m.update(surprise=1), "damaged"),
        (lambda m: m.update(dtype="float31"), "damaged"),
        (lambda m: m.update(dtype="nn"), "damaged"),
        (lambda m: m.update(tied=[]), "damaged"),
        (lambda m: m.update(settings="none"), "damaged"),
        (lambda m: m["replacements"][0].update(ranks=[3]), "does not fit"),
        (lambda m: m["replacements"][0].update(ranks=[99]), "does not fit"),
        (lambda m: m["replacements"][0].update(ranks=["2"]), "damaged"),
        (lambda m: m["replacements"][0].update(ranks=[2, 2]), "does not fit"),
        (lambda m: m["replacements"][0].update(scheme="tucker"), "does not fit"),
        (lambda m: m["replacements"][0].update(name="norm"), "does not fit"),
        (lambda m: m["replacements"][0].update(name="conv7", aliases=["conv7"]), "does not fit"),
        (lambda m: m["replacements"].pop(), "does not fit"),
        (lambda m: m.update(folded=[]), "does not fit"),
        (lambda m: m.update(folded=[["conv1", "conv9"]]), "does not fit"),
        (lambda m: m.update(unpacked=["conv1"]), "does not fit"),
        (lambda m: m.update(baked=["conv1"]), "does not fit"),
        (lambda m: m.update(baked=["conv9"]), "does not fit"),
        (
            lambda m: m.update(plain=[{"name": "conv1", "padding": [[0, 1], [0, 1]]}]),
            "does not fit",
        ),
        (lambda m: m.update(plain=[{"name": "conv1", "padding": [[0, -1], [0, 1]]}]), "damaged"),
        (lambda m: m.update(plain=["conv1"]), "damaged"),
        (lambda m: m.update(tied={"conv1.0.weight": "nothing"}), ""),
    ],
)
def test_edited_manifests_are_refused(
    result: tuple[Path, nn.Module], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    """Sealed again: what they say is checked as well."""
    file, model = result
    resealed(file, "compress", change)
    if not message:  # harmless: the tensor is there under its own name
        equal(model, load(file, model=tiny()))
        return
    with pytest.raises(ArtefactError, match=message):
        load(file, model=tiny())


def test_manifests_that_are_no_json(result: tuple[Path, nn.Module]) -> None:
    file, _ = result
    tensors = safetensors.torch.load_file(file)
    for text in ("{", "[]", "null", "{}"):
        write_sealed(file, tensors, {"compress": text})
        with pytest.raises(ArtefactError, match="damaged"):
            read_manifest(file)
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(ArtefactError, match="plain checkpoint"):
        read_manifest(file)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files_are_refused(result: tuple[Path, nn.Module], keep: float) -> None:
    file, _ = result
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ArtefactError, match="truncated or damaged"):
        load(file, model=tiny())


def test_other_architectures_are_refused(result: tuple[Path, nn.Module]) -> None:
    file, _ = result
    for other in (nn.Linear(4, 4), tiny(num_classes=4), Shared()):
        with pytest.raises(ArtefactError, match="does not fit the architecture"):
            load(file, model=other)


def test_missing_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="No file"):
        load(tmp_path / "none.safetensors")
    with pytest.raises(ArtefactError, match=r"holds no model\.safetensors"):
        load(tmp_path)


def test_a_result_is_no_checkpoint(result: tuple[Path, nn.Module]) -> None:
    with pytest.raises(CheckpointError, match="already compressed"):
        read_checkpoint(result[0])


def test_without_a_spec_the_architecture_must_be_passed(tmp_path: Path) -> None:
    file, model = compressed(tiny(), tmp_path)
    with pytest.raises(ArtefactError, match="model="):
        load(file, trust_code=True)
    equal(model, load(file, model=tiny()))


def test_saving_leaves_no_partial_file(tmp_path: Path) -> None:
    manifest = Manifest(model="", source_sha256="", dtype="float32")
    with pytest.raises(ArtefactError, match="cannot be written"):
        save(tiny(), manifest, tmp_path / "none" / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_models_that_ask_for_their_version_load(tmp_path: Path) -> None:
    """torchvision's MNASNet reads the version that a state dict carries, and refuses without."""
    from compress.inputs.checkpoint.loading import load_into
    from compress.inputs.checkpoint.reading import read_checkpoint
    from compress.inputs.models import build_model

    model = build_model("torchvision:mnasnet0_5?num_classes=4").module
    for name, write in (("w.pt", torch.save), ("w.safetensors", safetensors.torch.save_file)):
        write(model.state_dict(), tmp_path / name)
        load_into(model, read_checkpoint(tmp_path / name))
    manifest = Manifest(
        model="torchvision:mnasnet0_5?num_classes=4", source_sha256="", dtype="float32"
    )
    save(model, manifest, tmp_path / "model.safetensors")
    loaded = load(tmp_path).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items())
