"""The artefact: what is loaded is what was saved, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from networks.tiny import tiny
from safetensors import safe_open
from stopwatch import stop_the_clock
from torch import Tensor, nn
from workbench import SPEC, made_images

import compress
from compress.artefact.manifest import Manifest, read_manifest
from compress.artefact.model import load, save
from compress.errors import ArtefactError, CheckpointError

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
    assert made.manifest.channels_last == wins == (cost.memory_format == "channels_last")
    assert {x.dense_memory_format for x in cost.latency} == {"channels_last"}
    assert [x.ratio for x in cost.latency] == [pytest.approx((last if wins else 0.006) / 0.008)] * 2
    save(made.model, made.manifest, tmp_path / "model.safetensors")
    loaded = load(tmp_path, model=tiny())
    equal(made.model, loaded)
    strides = {
        tuple(p.stride()) for p in loaded.parameters() if p.dim() == 4 and p[0, 0].numel() > 1
    }
    assert {s[1] == 1 for s in strides} == {wins}


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


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny()
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        files.append(compressed(model, tmp_path / name, energy=0.9, rank={})[0].read_bytes())
    assert files[0] == files[1]


# --- Damage ------------------------------------------------------------------------------------


def rewritten(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of a file, as someone with an editor would."""
    tensors = safetensors.torch.load_file(file)
    with safe_open(file, "pt") as opened:
        manifest = json.loads(opened.metadata()["compress"])
    change(manifest)
    safetensors.torch.save_file(tensors, file, {"compress": json.dumps(manifest)})


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
        (lambda m: m.update(tied={"conv1.0.weight": "nothing"}), ""),
    ],
)
def test_edited_manifests_are_refused(
    result: tuple[Path, nn.Module], change: Callable[[dict[str, Any]], None], message: str
) -> None:
    file, model = result
    rewritten(file, change)
    if not message:  # harmless: the tensor is there under its own name
        equal(model, load(file, model=tiny()))
        return
    with pytest.raises(ArtefactError, match=message):
        load(file, model=tiny())


def test_manifests_that_are_no_json(result: tuple[Path, nn.Module]) -> None:
    file, _ = result
    tensors = safetensors.torch.load_file(file)
    for text in ("{", "[]", "null", "{}"):
        safetensors.torch.save_file(tensors, file, {"compress": text})
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
    from compress.inputs.checkpoint.reading import read_checkpoint

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
