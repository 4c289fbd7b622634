"""The manifest: how a compressed model is rebuilt and where it came from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress import __version__
from compress.config import Role, settings_of
from compress.errors import ArtefactError
from compress.files import MODEL_FILE, SEAL_KEY, BrokenSeal, check_tensors
from compress.inputs.checkpoint.reading import ARTEFACT_KEY
from compress.network.baking import PlainLayer
from compress.network.narrowing import Width
from compress.untrusted import Unreadable, parse_json, read_record
from compress.untrusted.tensors import read_metadata

# From 2 on, the file carries a digest of its content.
FORMAT = 2
# What a model can be saved and run in.
DTYPES = ("float32", "float16", "bfloat16", "float64")
# A side of 2,048 pixels is 50 MB a picture; far larger ones would fill any memory.
LARGEST_RECORDED_SIDE = 2048


@dataclass(frozen=True)
class Replacement:
    """One layer that was replaced by a chain.

    Attributes:
        name: Its qualified name; ``aliases`` are all of them.
        scheme: The scheme's name.
        ranks: Ranks per group.
    """

    name: str
    aliases: tuple[str, ...]
    scheme: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """How to rebuild a compressed model, and where it came from.

    Attributes:
        model: The model spec; ``""`` where the model was passed in by a program.
        source_sha256: Hash of the checkpoint file.
        dtype: The floating type of the tensors.
        baked: Modules whose parametrised weights became plain ones.
        unpacked: Attention modules rebuilt of linear layers.
        plain: Subclasses of layers that plain ones replaced.
        folded: Pairs of (layer, norm) names.
        widths: How wide modules became that channels were taken out of.
        replacements: Chains by layer, at these widths.
        tied: Names of tensors that share another's storage, with that name.
        settings: What decided the outcome, paths left out.
        calibration: Fingerprint of the calibration images, their number and the seed.
        verified: The end metric on the test set; empty for an unverified model.
        recovered: Fingerprint of the images that it learned from the original on, and the seed;
            empty where it did not.
        not_finite: Names of tensors that hold NaN or infinite values, as those of the original.
        versions: Of compress and torch.
    """

    model: str
    source_sha256: str
    dtype: str
    baked: tuple[str, ...] = ()
    unpacked: tuple[str, ...] = ()
    plain: tuple[PlainLayer, ...] = ()
    folded: tuple[tuple[str, str], ...] = ()
    widths: tuple[Width, ...] = ()
    replacements: tuple[Replacement, ...] = ()
    tied: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    verified: dict[str, Any] = field(default_factory=dict)
    recovered: dict[str, Any] = field(default_factory=dict)
    not_finite: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """Write the manifest on one line, keys sorted, so that equal manifests are equal bytes."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"compress": __version__, "torch": torch.__version__}


def result_file(path: str | Path) -> Path:
    """Return the model file of a result: the file itself, or the one in a result folder.

    Raises:
        ArtefactError: There is none.
    """
    path = Path(path)
    file = path / MODEL_FILE if path.is_dir() else path
    if not file.is_file():
        where = f"The folder {path} holds no {MODEL_FILE}" if path.is_dir() else f"No file {path}"
        raise ArtefactError(
            f"{where}; pass a result of `compress run`, or run it again where its gates failed."
        )
    return file


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest of a result, and check that all of the file is what was written.

    Raises:
        ArtefactError: No compressed model, truncated, damaged, edited, or of another format.
    """
    file = result_file(path)
    try:
        metadata = read_metadata(file)
    except (OSError, Unreadable) as error:
        raise ArtefactError(
            f"{file} is not a readable safetensors file ({error}); it is truncated or damaged. "
            "Copy it again, or run `compress run` again."
        ) from error
    if SEAL_KEY in metadata:
        _check_seal(file)
    if ARTEFACT_KEY not in metadata:
        raise ArtefactError(
            f"{file} holds no compress manifest: it is a plain checkpoint. Pass a result of "
            "`compress run`."
        )
    manifest = _parse(metadata[ARTEFACT_KEY], file)
    if SEAL_KEY not in metadata:
        _check_seal(file)
    return manifest


def _check_seal(file: Path) -> None:
    try:
        check_tensors(file)
    except BrokenSeal as error:
        raise ArtefactError(
            f"{file} {error}. Copy it again, or run `compress run` again."
        ) from error
    except OSError as error:
        raise ArtefactError(f"{file} cannot be read: {error.strerror}.") from error


def _parse(text: str, file: Path) -> Manifest:
    damaged = f"The manifest of {file} is damaged; run `compress run` again."
    try:
        raw = parse_json(text)
        if not isinstance(raw, dict) or type(raw.get("format")) is not int:
            raise ArtefactError(damaged)
        if raw["format"] > FORMAT:
            raise ArtefactError(
                f"{file} has format {raw['format']} and this version of compress reads up to "
                f"{FORMAT}; update compress."
            )
        if raw["format"] < FORMAT:
            raise ArtefactError(
                f"{file} has format {raw['format']}, which carries no digest of its content; this "
                f"version of compress reads format {FORMAT}: run `compress run` again."
            )
        # What is done to the architecture is never left to a default.
        if not {"unpacked", "folded", "replacements", "not_finite"} <= raw.keys():
            raise ArtefactError(damaged)
        manifest = read_record(Manifest, raw, "the manifest")
    except Unreadable as error:
        raise ArtefactError(damaged) from error
    if manifest.dtype not in DTYPES:
        raise ArtefactError(damaged)
    return manifest


def is_artefact(path: str | Path) -> bool:
    """Whether a path is a result folder or a safetensors file with this package's manifest."""
    path = Path(path)
    if path.is_dir():
        return _is_result_folder(path)
    try:
        return ARTEFACT_KEY in read_metadata(path)
    except (OSError, Unreadable):
        return False


def _is_result_folder(path: Path) -> bool:
    """Whether a folder holds a result; one that is damaged is one, plain weights are none."""
    file = path / MODEL_FILE
    try:
        metadata = read_metadata(file)
    except (OSError, Unreadable):
        return file.is_file()
    return ARTEFACT_KEY in metadata or SEAL_KEY in metadata


def recorded_settings(manifest: Manifest) -> dict[str, Any]:
    """What a result says of its checkpoint, images and limits, as defaults to measure it again.

    Raises:
        ArtefactError: It asks for pictures of a size that only the user may ask for.
    """
    settings = manifest.settings
    names = settings_of(Role.ENTRIES, Role.PICTURES, Role.TASK, Role.GATE)
    recorded = {n: settings[n] for n in names if settings.get(n) not in (None, "", [], ())}
    for name in ("resize", "crop"):
        size = recorded.get(name)
        sides = [n for n in (size if isinstance(size, list | tuple) else [size]) if type(n) is int]
        if sides and max(sides) > LARGEST_RECORDED_SIDE:
            raise ArtefactError(
                f"The result records {name} = {max(sides):,} pixels, and a file may ask for at "
                f"most {LARGEST_RECORDED_SIDE:,}, since every picture would be enlarged to that: "
                f"pass --{name} {','.join(map(str, sides))} yourself if the network really takes "
                "such images."
            )
    return recorded
