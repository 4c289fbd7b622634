"""What is checked before a flat module changes or runs anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from compress.errors import near_matches

Buffers = Mapping[str, Tensor] | Sequence[Tensor]


def check_parameters(name: str, named: dict[str, nn.Parameter]) -> None:
    """Raise ValueError unless the parameters have shapes, one dtype and one device."""
    for key, parameter in named.items():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"{name} has the lazy parameter {key!r}, which has no shape yet; run a forward "
                "before wrapping it in FlatModule."
            )
    for what in ("dtype", "device"):
        kinds: dict[str, list[str]] = {}
        for key, parameter in named.items():
            kinds.setdefault(str(getattr(parameter, what)), []).append(key)
        if len(kinds) > 1:
            listed = "; ".join(
                f"{kind}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
                for kind, keys in kinds.items()
            )
            raise ValueError(
                f"{name} has parameters of {len(kinds)} {what}s, which one vector cannot hold "
                f"({listed}); convert them to one {what} first."
            )


def check_state(
    name: str, given: Mapping[str, Any], expected: Mapping[str, Any], strict: bool
) -> None:
    """Raise RuntimeError listing every entry that does not fit, before anything is loaded."""
    problems = [
        f"{key} has shape {tuple(value.shape)} instead of {tuple(expected[key].shape)}"
        for key, value in given.items()
        if isinstance(expected.get(key), Tensor) and value.shape != expected[key].shape
    ]
    if strict:
        problems += [f"{key} is missing" for key in expected if key not in given]
        problems += [f"{key} is unexpected" for key in given if key not in expected]
    if problems:
        more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise RuntimeError(
            f"The state dict does not fit FlatModule({name}): {'; '.join(problems[:20])}{more}."
        )


def checked_buffers(module: nn.Module, given: Buffers) -> dict[str, Tensor]:
    """Return all buffers by name, in order: those given, copies of the module's own for the rest.

    Raises:
        ValueError: Unknown names, a wrong number, or another shape, dtype or device.
    """
    own = dict(module.named_buffers())
    where = f"FlatModule({type(module).__name__})"
    if isinstance(given, Mapping):
        for name in given:
            if name not in own:
                raise ValueError(f"{where} has no buffer {name!r}.{near_matches(str(name), own)}")
        values = {n: given[n] if n in given else b.clone() for n, b in own.items()}
    else:
        if len(given) != len(own):
            raise ValueError(f"{where} has {len(own)} buffers; it got {len(given)}.")
        values = dict(zip(own, given, strict=True))
    for name, value in values.items():
        kept = own[name]
        got, wanted = ((tuple(t.shape), str(t.dtype), str(t.device)) for t in (value, kept))
        if got != wanted:
            raise ValueError(f"{where} expects the buffer {name!r} as {wanted}; it got {got}.")
    return values
