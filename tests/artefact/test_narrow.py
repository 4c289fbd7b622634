"""Results with channels taken out, and manifests that say what cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from damage import write_sealed
from networks.narrow import mobile, settled
from stopwatch import stop_the_clock
from torch import nn
from workbench import made_images

import compress
from compress.artefact.manifest import read_manifest
from compress.artefact.model import restructure
from compress.errors import ArtefactError
from compress.network.narrowing import Width


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result with narrower layers."""
    folder = tmp_path_factory.mktemp("narrow") / "out"
    pixels, _ = made_images(48)
    images = torch.tensor(pixels).unsqueeze(1).float() / 255
    with pytest.MonkeyPatch.context() as patch:
        stop_the_clock(patch)
        compress.compress_model(
            settled(mobile()), images, macs=0.5, refit=False, no_latency=True, output=str(folder)
        )
    return folder / "model.safetensors"


def test_widths_are_read_back_and_give_the_shapes_that_are_saved(result: Path) -> None:
    manifest = read_manifest(result)
    assert manifest.widths
    built = restructure(mobile(), manifest)
    saved = safetensors.torch.load_file(result)
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in saved.items()
    }
    names = {w.name for w in manifest.widths}
    for width in manifest.widths:
        assert width.name in width.aliases
        assert width.inputs >= 1
        assert width.outputs >= 1
    depthwise = [n for n, m in mobile().named_modules() if getattr(m, "groups", 1) > 1]
    assert names & set(depthwise)


WRONG = {
    "no such module": Width("nowhere", ("nowhere",), 1, 1),
    "no such alias": Width("stem.0", ("stem.0", "nowhere.at.all"), 1, 4),
    "wider": Width("second.0", ("second.0",), 9, 8),
    "zero": Width("second.0", ("second.0",), 8, 0),
    "negative": Width("second.0", ("second.0",), 8, -4),
    "no channels": Width("second.2", ("second.2",), 1, 1),
    "the model": Width("", ("",), 1, 1),
    "another shape": Width("second.3", ("second.3",), 1, 1),
    "not of the network": Width("second.0", ("second.0",), 4, 8, inputs_kept=(1, 3, 4, 8)),
    "twice": Width("second.0", ("second.0",), 4, 8, inputs_kept=(1, 3, 3, 5)),
    "too few": Width("second.0", ("second.0",), 8, 8, outputs_kept=(1, 3)),
    "too large to be": Width("second.0", ("second.0",), 8, 10**12),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_widths_that_cannot_be_are_refused(case: str, result: Path, tmp_path: Path) -> None:
    manifest = read_manifest(result)
    others = tuple(w for w in manifest.widths if w.name != WRONG[case].name)
    changed = replace(manifest, widths=(*others, WRONG[case]))
    file = tmp_path / "model.safetensors"
    write_sealed(file, safetensors.torch.load_file(result), {"compress": changed.to_json()})
    why = "is damaged" if case == "negative" else "does not fit the architecture"
    with pytest.raises(ArtefactError, match=why):
        compress.load(file, model=mobile())


def test_another_architecture_is_refused(result: Path) -> None:
    with pytest.raises(ArtefactError, match="does not fit the architecture"):
        compress.load(result, model=nn.Sequential(nn.Conv2d(1, 4, 3)))
