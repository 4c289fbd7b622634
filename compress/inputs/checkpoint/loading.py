"""Loading a checkpoint into a model: every entry of it and nothing less."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CheckpointError
from compress.inputs.checkpoint.reading import PREFIXES, Checkpoint, listed
from compress.inputs.checkpoint.states import first_parts
from compress.running.forward import require_tensors

_MOST_HEADS = 100


def load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a checkpoint into a model, every entry of it and nothing less.

    Three differences are mended because they are sure to be harmless: ``num_batches_tracked``
    may be missing (files from before torch 0.4.1 lack it, and evaluation never reads it), one
    name of a tied tensor is enough, and torchvision's first DenseNet names (``norm.1``) are
    understood. Where the model's own names begin with a prefix that `read_checkpoint` stripped,
    or all of them with one that the checkpoint lacks, such as ``backbone.``, it is put in front.

    Raises:
        CheckpointError: Entries are missing, unexpected, of another shape, or whole or complex
            numbers where the model has real ones: the first 20 of each and their number, with a
            hint where the cause is known. The model is unchanged.
    """
    require_tensors(model)
    own = model.state_dict(keep_vars=True)
    state = _fitting_names(checkpoint, own)
    _fill_tied(state, own, checkpoint)
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in state if n not in own]
    misshapen = [n for n in own if n in state and _shape(state[n]) != _shape(own[n])]
    mistyped = [n for n in own if n in state and _loses_values(state[n], own[n])]
    if missing or unexpected or misshapen or mistyped:
        problems = []
        if missing:
            problems.append(f"missing from the checkpoint: {listed(missing)}")
        if unexpected:
            problems.append(f"unknown to the model: {listed(unexpected)}")
        if misshapen:
            shapes = [
                f"{n} ({list(_shape(state[n]))} in the checkpoint, {list(_shape(own[n]))} in the "
                "model)"
                for n in misshapen
            ]
            problems.append(f"of another shape: {listed(shapes)}")
        if mistyped:
            types = [f"{n} ({str(state[n].dtype).removeprefix('torch.')})" for n in mistyped]
            problems.append(f"of a type that is not a real number's: {listed(types)}")
        raise CheckpointError(
            f"The checkpoint {checkpoint.path} does not belong to this model: "
            f"{'; '.join(problems)}.{_hint(state, own, misshapen)}{_other_states(checkpoint)}"
        )
    model.load_state_dict(versioned(state, own), strict=False)


def versioned(state: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return ``state`` with the module versions of a model's own state dict.

    Modules read there how to understand their entries; torchvision's MNASNet refuses to load
    without, and safetensors files carry none.
    """
    known: OrderedDict[str, Tensor] = OrderedDict(state)
    known._metadata = getattr(own, "_metadata", {})  # type: ignore[attr-defined]  # torch's way
    return known


def _shape(entry: Any) -> tuple[int, ...]:
    return tuple(entry.shape) if isinstance(entry, Tensor) else ()


def _loses_values(given: Tensor, wanted: Any) -> bool:
    """Whether torch would load whole (quantised) or complex numbers as real ones, scale or not."""
    real = isinstance(wanted, Tensor) and wanted.is_floating_point()
    return real and not given.is_floating_point()


def _fitting_names(checkpoint: Checkpoint, own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the checkpoint's entries to what the model calls them, where that is certain."""
    parts = re.findall("|".join(re.escape(p) for p in PREFIXES), checkpoint.prefix)
    fronts = ["".join(parts[k:]) for k in range(len(parts), -1, -1)]
    front = max(fronts, key=lambda f: sum(f + n in own for n in checkpoint.state))
    wrapped = (w for w in _wrappers(own) if all(w + n in own for n in checkpoint.state))
    if not all(front + n in own for n in checkpoint.state):
        front = next(wrapped, front)
    state = {front + n: t for n, t in checkpoint.state.items()}
    old_densenet = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")
    renamed = {n: old_densenet.sub(r"\1", n) for n in state if n not in own}
    return {renamed.get(n, n): t for n, t in state.items()}


def _wrappers(own: Mapping[str, Any]) -> Iterator[str]:
    """Yield what all names of a model begin with, the longest first: ``net.body.``, ``net.``."""
    some = next(iter(own), "").split(".")[:-1]
    for count in range(len(some), 0, -1):
        front = "".join(f"{part}." for part in some[:count])
        if all(name.startswith(front) for name in own):
            yield front


def _fill_tied(state: dict[str, Tensor], own: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Give every name of a tied tensor the value that the checkpoint has under one of them."""
    names: dict[int, list[str]] = {}
    for name, entry in own.items():
        names.setdefault(id(entry), []).append(name)
    for tied in (group for group in names.values() if len(group) > 1):
        given = [n for n in tied if n in state]
        for other in given[1:]:
            if not torch.equal(state[given[0]], state[other]):
                raise CheckpointError(
                    f"The model ties {given[0]} and {other} to one tensor, but the checkpoint "
                    f"{checkpoint.path} holds different values for them; build the model untied."
                )
        if given:
            state.update(dict.fromkeys(tied, state[given[0]]))


def _hint(state: Mapping[str, Tensor], own: Mapping[str, Any], misshapen: list[str]) -> str:
    """Say what is probably wrong, where the differences have one known cause."""
    prefix = _fitting_prefix(state, own)
    if prefix:
        return f" The entries that begin with {prefix!r} fit: pass --prefix {prefix}."
    if not any(n in own for n in state):
        return (
            " No entry matches: this is another architecture, or the names carry a prefix; they "
            f"begin with {listed(first_parts(state))}."
        )
    pairs = {(_shape(state[n]), _shape(own[n])) for n in misshapen}
    sizes = {(a[0], b[0]) for a, b in pairs if a and b and a[1:] == b[1:]}
    last = [n for n in own if n.endswith("weight")][-1:]
    if len(sizes) == 1 and last and last[0] in misshapen and state[last[0]].ndim > 1:
        there, here = next(iter(sizes))
        return (
            f" The checkpoint's {last[0].rpartition('.')[0]} has {there} classes, the model's "
            f"{here}: pass ?num_classes={there} in the model spec."
        )
    extra = {n.partition(".")[0] for n in state if n not in own}
    if extra and extra <= {"aux1", "aux2", "AuxLogits"}:
        return " The checkpoint has auxiliary classifiers: pass ?aux_logits=true in the model spec."
    return " Is it the right model spec?"


def _fitting_prefix(state: Mapping[str, Tensor], own: Mapping[str, Any]) -> str:
    """What to pass as ``--prefix`` so that all of the model is there; ``""`` for nothing."""
    needed = {n: _shape(t) for n, t in own.items() if not n.endswith("num_batches_tracked")}
    heads = [h for h in first_parts(state)[:_MOST_HEADS] if h.endswith(".")]
    return next(
        (
            head
            for head in heads
            if all(head + n in state and _shape(state[head + n]) == s for n, s in needed.items())
        ),
        "",
    )


def _other_states(checkpoint: Checkpoint) -> str:
    """Say which other state dicts the file holds."""
    if not checkpoint.others:
        return ""
    read = (
        f"The state dict under {checkpoint.container!r} was read"
        if checkpoint.container
        else ("The entries of the file itself were read")
    )
    return f" {read}; choose another with --checkpoint-key: {listed(checkpoint.others)}."
