"""The artefact: one safetensors file whose header says how to rebuild the model.

The header also holds a digest of everything in the file, which is checked whenever it is read. Its
``compress`` entry is a JSON manifest: how the original is built, what was folded and
replaced, settings, accuracies, versions. Nothing in it is run: building from torchvision is this
package's own doing, and a user's own factory is imported only when the caller says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from compress.artefact.manifest import Manifest, Replacement, read_manifest, result_file
from compress.artefact.runtime import read_runtime
from compress.errors import ArtefactError, ModelError
from compress.files import sealed_tensors, write_atomically
from compress.inputs.checkpoint.loading import versioned
from compress.inputs.checkpoint.reading import ARTEFACT_KEY, listed
from compress.inputs.models import build_model
from compress.layers import kind_of
from compress.linalg.schemes import SCHEME_NAMES, scheme_named
from compress.modules.attention import unpack
from compress.network.baking import bake_weights, put_plain
from compress.network.chains import empty_chain
from compress.network.narrowing import kept_in, resized
from compress.network.norms import after_norm
from compress.running.finite import not_finite
from compress.running.memory_format import put_in_format
from compress.running.modules import cast, replace_module
from compress.trust import require_trusted_model
from compress.untrusted import Unreadable
from compress.untrusted.tensors import read_tensors


def save(model: nn.Module, manifest: Manifest, path: str | Path) -> Manifest:
    """Write a model and its manifest as one file, atomically.

    Args:
        model: The compressed model, in the dtype it is saved in.
        manifest: What it is; `tied` is filled in here.
        path: The file.

    Returns:
        The manifest as written.

    Raises:
        ArtefactError: The file cannot be written, or weights are not finite that were so in the
            original; what stood at ``path`` before still stands.
    """
    tensors, tied = _untied(model.state_dict())
    _check_finite(tensors, manifest, "The compressed model")
    manifest = Manifest(**{**_shallow(manifest), "tied": tied})
    metadata = {ARTEFACT_KEY: manifest.to_json()}
    write_atomically(path, sealed_tensors(safetensors.torch.save(tensors), metadata))
    return manifest


def _check_finite(tensors: Mapping[str, Tensor], manifest: Manifest, what: str) -> None:
    broken = [name for name in not_finite(tensors) if name not in manifest.not_finite]
    if broken:
        raise ArtefactError(
            f"{what} holds NaN or infinite values in {listed(broken)}, where the original had "
            f"finite ones. Numbers beyond what {manifest.dtype} holds become infinite: compress "
            "the network in a wider type, or keep these layers with --keep."
        )


def _shallow(manifest: Manifest) -> dict[str, Any]:
    return {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}


def _untied(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Separate tensors from the names that only repeat one; safetensors holds each once."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[torch.device, int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name in sorted(state):
        # Where the tensor is: a copy on the CPU might get the place of one that is gone.
        tensor = state[name].detach()
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() and key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        kept[name] = tensor.cpu().contiguous().clone()
    return kept, tied


def load(
    path: str | Path, model: nn.Module | None = None, *, trust_code: bool = False
) -> nn.Module:
    """Load a compressed model as plain ``nn`` modules.

    Args:
        path: A result folder or its ``model.safetensors``.
        model: The original architecture, where the file names a factory of the user's own; it is
            changed and returned (its weights are replaced).
        trust_code: Whether to import and call that factory instead.

    Returns:
        The model in eval mode, in the dtype it was saved in, and in the memory format that
        ``runtime.json`` names where that lies beside it.

    Raises:
        ArtefactError: The file is not a result, damaged, edited, of another format, or does not
            fit the model; its weights are not finite where those of the original were; or it names
            code of the user's own and neither ``model`` nor ``trust_code`` was passed.
        ModelError: The architecture cannot be built.
    """
    loaded = rebuilt(path, model, trust_code=trust_code)
    problem = read_runtime(result_file(path)).problem
    if problem:
        warnings.warn(problem, stacklevel=2)
    return loaded


def rebuilt(
    path: str | Path, model: nn.Module | None = None, *, trust_code: bool = False
) -> nn.Module:
    """As `load`, for callers that say themselves what is wrong with ``runtime.json``."""
    file = result_file(path)
    manifest = read_manifest(file)
    if model is None:
        if not manifest.model:
            raise ArtefactError(
                f"{file} was made from a model that a program passed in; pass the same "
                "architecture as compress.load(path, model=...)."
            )
        if not trust_code:
            require_trusted_model(manifest.model, f"The result {file}", ArtefactError)
        model = build_model(manifest.model).module
    return _filled(model, manifest, file)


def _filled(model: nn.Module, manifest: Manifest, file: Path) -> nn.Module:
    try:
        state = read_tensors(file).tensors
    except (OSError, Unreadable) as error:
        raise ArtefactError(f"{file} is truncated or damaged ({error}).") from error
    _check_finite(state, manifest, str(file))
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
    model = cast(model, getattr(torch, manifest.dtype))
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
    faster = read_runtime(file).memory_format
    if faster != "contiguous":
        put_in_format(model, faster)
    return model.eval()


def _differences(own: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    missing = [k for k, v in own.items() if k not in state or state[k].shape != v.shape]
    return missing, [k for k in state if k not in own]


def restructure(model: nn.Module, manifest: Manifest) -> nn.Module:
    """Give an original architecture the structure of the compressed one; values are left over."""
    bake_weights(model, manifest.baked)
    model = unpack(model, manifest.unpacked)
    model = put_plain(model, manifest.plain)
    for layer, norm in manifest.folded:
        module = model.get_submodule(layer)
        if module._parameters.get("bias") is None:
            channels = getattr(module, "out_channels", None) or module.out_features
            weight = module.weight
            assert isinstance(weight, Tensor)
            # Modules type their attributes as tensors or modules; this one is a whole number.
            module.bias = nn.Parameter(torch.zeros(int(channels)).to(weight))  # type: ignore[arg-type]
        found = model.get_submodule(norm)
        rest = after_norm(found)
        if rest is None:
            raise ValueError(
                f"module {norm!r} is a {type(found).__name__}, not a BatchNorm to fold"
            )
        for name, other in list(model.named_modules(remove_duplicate=False)):
            if other is found:
                replace_module(model, name, rest)
    for width in manifest.widths:
        module = model.get_submodule(width.name)
        kept_in(width, module)  # what it says has to be possible, though only comparisons use it
        narrow = resized(module, width.inputs, width.outputs, biased=width.biased)
        for alias in width.aliases:
            replace_module(model, alias, narrow)
    for replacement in manifest.replacements:
        model = _replaced(model, replacement)
    return model


def _replaced(model: nn.Module, replacement: Replacement) -> nn.Module:
    old = model.get_submodule(replacement.name)
    kind = kind_of(old)
    if kind is None or replacement.scheme not in SCHEME_NAMES:
        raise ValueError(f"layer {replacement.name!r} is a {type(old).__name__}")
    geometry = kind.geometry(old)
    limits = scheme_named(replacement.scheme).full_ranks(geometry)
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


def load_result(path: str, model: str, *, trust_code: bool) -> tuple[nn.Module, str]:
    """Load a result by a spec that the user gave, else by its own.

    Args:
        path: The result.
        model: The user's spec, or ``""``.
        trust_code: Whether the result's own spec may name code that is not torchvision's.

    Returns:
        The model and the spec it was built from.
    """
    if model:
        return rebuilt(path, build_model(model).module), model
    return rebuilt(path, trust_code=trust_code), read_manifest(path).model
