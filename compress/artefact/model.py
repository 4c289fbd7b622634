"""The artefact: one safetensors file whose header says how to rebuild the model.

The header's ``compress`` entry is a JSON manifest: how the original is built, what was folded and
replaced, settings, accuracies, versions. Nothing in it is run: building from torchvision is this
package's own doing, and a user's own factory is imported only when the caller says so.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from compress import __version__
from compress.errors import ArtefactError, ModelError
from compress.files import write_atomically
from compress.inputs.checkpoint.loading import versioned
from compress.inputs.checkpoint.reading import ARTEFACT_KEY
from compress.layers import kind_of
from compress.linalg.schemes import SCHEME_NAMES, full_ranks
from compress.modules.attention import unpack
from compress.network.chains import empty_chain
from compress.network.graph import replace_module
from compress.running.memory_format import put_in_format
from compress.specs import build_model, needs_trust

MODEL_FILE = "model.safetensors"
FORMAT = 1


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
        unpacked: Attention modules rebuilt of linear layers.
        folded: Pairs of (layer, norm) names.
        replacements: Chains by layer.
        tied: Names of tensors that share another's storage, with that name.
        settings: What decided the outcome, paths left out.
        calibration: Fingerprint of the calibration images, their number and the seed.
        verified: The end metric on the test set; empty for an unverified model.
        channels_last: Whether the model ran faster in that memory format when measured.
        versions: Of compress and torch.
    """

    model: str
    source_sha256: str
    dtype: str
    unpacked: tuple[str, ...] = ()
    folded: tuple[tuple[str, str], ...] = ()
    replacements: tuple[Replacement, ...] = ()
    tied: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    verified: dict[str, Any] = field(default_factory=dict)
    channels_last: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> str:
        """Write the manifest on one line, keys sorted, so that equal manifests are equal bytes."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"compress": __version__, "torch": torch.__version__}


def save(model: nn.Module, manifest: Manifest, path: str | Path) -> Manifest:
    """Write a model and its manifest as one file, atomically.

    Args:
        model: The compressed model, in the dtype it is saved in.
        manifest: What it is; `tied` is filled in here.
        path: The file.

    Returns:
        The manifest as written.
    """
    tensors, tied = _untied(model.state_dict())
    manifest = Manifest(**{**_shallow(manifest), "tied": tied})
    metadata = {ARTEFACT_KEY: manifest.to_json()}
    write_atomically(path, safetensors.torch.save(tensors, metadata=metadata))
    return manifest


def _shallow(manifest: Manifest) -> dict[str, Any]:
    return {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}


def _untied(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Separate tensors from the names that only repeat one; safetensors holds each once."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        key = (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() and key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        kept[name] = tensor.contiguous().clone()
    return kept, tied


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
    """Read the manifest of a result.

    Raises:
        ArtefactError: No compressed model, truncated, tampered with, or of a newer format.
    """
    file = result_file(path)
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError, struct.error) as error:
        raise ArtefactError(
            f"{file} is no readable safetensors file ({error}); it is truncated or damaged. Copy "
            "it again, or run `compress run` again."
        ) from error
    if ARTEFACT_KEY not in metadata:
        raise ArtefactError(
            f"{file} holds no compress manifest: it is a plain checkpoint. Pass a result of "
            "`compress run`."
        )
    return _parse(metadata[ARTEFACT_KEY], file)


def _parse(text: str, file: Path) -> Manifest:
    damaged = f"The manifest of {file} is damaged; run `compress run` again."
    try:
        raw = json.loads(text)
        if not isinstance(raw, dict) or not isinstance(raw.get("format"), int):
            raise ArtefactError(damaged)
        if raw["format"] > FORMAT:
            raise ArtefactError(
                f"{file} has format {raw['format']} and this version of compress reads up to "
                f"{FORMAT}; update compress."
            )
        raw["replacements"] = tuple(
            Replacement(str(r["name"]), tuple(r["aliases"]), str(r["scheme"]), tuple(r["ranks"]))
            for r in raw["replacements"]
        )
        raw["folded"] = tuple((str(a), str(b)) for a, b in raw["folded"])
        raw["unpacked"] = tuple(raw["unpacked"])
        manifest = Manifest(**raw)
        dtype = getattr(torch, manifest.dtype, None)
        numbers = [n for r in manifest.replacements for n in r.ranks]
        plain = (manifest.tied, manifest.settings, manifest.calibration, manifest.verified)
        if any(type(n) is not int for n in numbers) or any(type(d) is not dict for d in plain):
            raise ArtefactError(damaged)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtefactError(damaged) from error
    if not isinstance(dtype, torch.dtype):
        raise ArtefactError(damaged)
    return manifest


def load(path: str | Path, model: nn.Module | None = None, trust_code: bool = False) -> nn.Module:
    """Load a compressed model as plain ``nn`` modules.

    Args:
        path: A result folder or its ``model.safetensors``.
        model: The original architecture, where the file names a factory of the user's own; it is
            changed and returned (its weights are replaced).
        trust_code: Whether to import and call that factory instead.

    Returns:
        The model in eval mode, in the dtype it was saved in.

    Raises:
        ArtefactError: The file is no result, damaged, newer, or does not fit the model; or it
            names code of the user's own and neither ``model`` nor ``trust_code`` was passed.
        ModelError: The architecture cannot be built.
    """
    file = result_file(path)
    manifest = read_manifest(file)
    if model is None:
        if not manifest.model:
            raise ArtefactError(
                f"{file} was made from a model that a program passed in; pass the same "
                "architecture as compress.load(path, model=...)."
            )
        if needs_trust(manifest.model) and not trust_code:
            raise ArtefactError(
                f"{file} is rebuilt by the code {manifest.model!r}, and loading a file must not "
                "run code unasked: pass the architecture as compress.load(path, model=...), or "
                "trust_code=True (--trust-code) where you trust that code."
            )
        model = build_model(manifest.model).module
    return _filled(model, manifest, file)


def _filled(model: nn.Module, manifest: Manifest, file: Path) -> nn.Module:
    try:
        state = safetensors.torch.load_file(file)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{file} is truncated or damaged ({error}).") from error
    try:
        model = restructure(model.float().eval(), manifest)
    except (
        AttributeError,
        ValueError,
        KeyError,
        StopIteration,
        RuntimeError,
        ModelError,
    ) as error:
        raise ArtefactError(
            f"{file} does not fit the architecture it was given ({error}); pass the one that was "
            "compressed, with the same arguments."
        ) from error
    model = model.to(getattr(torch, manifest.dtype))
    for name, source in manifest.tied.items():
        if source in state:
            state[name] = state[source]
    own = model.state_dict()
    missing, unexpected = _differences(own, state)
    if missing or unexpected:
        raise ArtefactError(
            f"{file} does not fit the architecture it was given: "
            f"{len(missing)} entries missing or misshapen ({', '.join(missing[:20])}) and "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:20])}). Pass the architecture "
            "that was compressed, with the same arguments."
        )
    model.load_state_dict(versioned(state, own), strict=True)
    if manifest.channels_last:
        put_in_format(model, "channels_last")
    return model.eval()


def _differences(own: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    missing = [k for k, v in own.items() if k not in state or state[k].shape != v.shape]
    return missing, [k for k in state if k not in own]


def restructure(model: nn.Module, manifest: Manifest) -> nn.Module:
    """Give an original architecture the structure of the compressed one; values are left over."""
    model = unpack(model, manifest.unpacked)
    for layer, norm in manifest.folded:
        module = model.get_submodule(layer)
        if module._parameters.get("bias") is None:
            channels = getattr(module, "out_channels", None) or module.out_features
            weight = module.weight
            assert isinstance(weight, Tensor)
            # Modules type their attributes as tensors or modules; this one is a whole number.
            module.bias = nn.Parameter(torch.zeros(int(channels)).to(weight))  # type: ignore[arg-type]
        found = model.get_submodule(norm)
        for name, other in list(model.named_modules(remove_duplicate=False)):
            if other is found:
                replace_module(model, name, nn.Identity())
    for replacement in manifest.replacements:
        model = _replaced(model, replacement)
    return model


def _replaced(model: nn.Module, replacement: Replacement) -> nn.Module:
    old = model.get_submodule(replacement.name)
    kind = kind_of(old)
    if kind is None or replacement.scheme not in SCHEME_NAMES:
        raise ValueError(f"layer {replacement.name!r} is a {type(old).__name__}")
    geometry = kind.geometry(old)
    limits = full_ranks(geometry, replacement.scheme)
    fits = len(limits) == len(replacement.ranks) and all(
        1 <= r <= limit for r, limit in zip(replacement.ranks, limits, strict=True)
    )
    if not fits:
        raise ValueError(f"layer {replacement.name!r} cannot have ranks {replacement.ranks}")
    chain = empty_chain(geometry, replacement.scheme, replacement.ranks, old)
    if replacement.name == "":
        return chain
    for alias in replacement.aliases:
        replace_module(model, alias, chain)
    return model
