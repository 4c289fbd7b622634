"""From a model spec to a module: one of a library's, or what the user's own factory returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from compress.errors import ModelError
from compress.libraries import LIBRARIES, FromLibrary, library_of
from compress.libraries.record import Convert
from compress.running.modules import dtype_of
from compress.specs import call_factory, split_spec
from compress.vision.preprocessing import Preprocessing

MODEL_FORMS = (
    f"{', '.join(library.example for library in LIBRARIES)}, "
    "package.module:factory?width=32 or path/to/file.py:factory"
)


@dataclass(frozen=True)
class BuiltModel:
    """A network in eval mode and float32, with random weights, and what its spec says of it.

    Attributes:
        module: The network.
        spec: The spec it was built from.
        preset: The preprocessing that a library has for the network, None for other models.
        input_shape: One input without the batch axis, ``(C, H, W)``: what the library says, or the
            module's attribute ``input_shape``; None where neither is there.
        dtype: The floating type that most of its numbers had when it was built.
        convert: As that of `FromLibrary`.
    """

    module: nn.Module
    spec: str
    preset: Preprocessing | None
    input_shape: tuple[int, ...] | None
    dtype: torch.dtype = torch.float32
    convert: Convert | None = None


def build_model(spec: str) -> BuiltModel:
    """Build the network that a spec names.

    The global random state is left as it was, and the network is the same every time.

    Raises:
        ModelError: The spec is malformed, names nothing that exists, or its factory fails or
            returns no ``nn.Module``. The message says which and names near matches.
    """
    head, arguments = split_spec(spec, ModelError)
    found = library_of(head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if found is not None:
            library, name = found
            return _built(spec, library.build(name, arguments))
        module = call_factory(head, arguments, ModelError, MODEL_FORMS)
    if isinstance(module, nn.Module) and not isinstance(module, torch.jit.ScriptModule):
        # torch.compile runs a program it made of the layers, past the layers themselves.
        module = module._modules.get("_orig_mod", module)
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"The factory {head} returned {type(module).__name__}, not an nn.Module; "
            "let it return the network itself."
        )
    _check_plain(module, head)
    hint = getattr(module, "input_shape", None)
    known = isinstance(hint, tuple | list) and all(type(n) is int and n > 0 for n in hint)
    shape = tuple(hint) if known and hint else None
    return _built(spec, FromLibrary(module, None, shape))


def preset_of(spec: str) -> Preprocessing | None:
    """The preprocessing that a library has for the network of a spec; code of others has none.

    Raises:
        ModelError: The network cannot be built.
    """
    found = library_of(split_spec(spec, ModelError)[0])
    return None if found is None else build_model(spec).preset


def _built(spec: str, made: FromLibrary) -> BuiltModel:
    entries = made.module.state_dict().values()
    dtype = dtype_of(entry for entry in entries if isinstance(entry, Tensor))
    module = made.module.float().eval()
    return BuiltModel(module, spec, made.preset, made.input_shape, dtype, made.convert)


def _check_plain(module: nn.Module, head: str) -> None:
    """Refuse networks that have no layers to look at.

    Raises:
        ModelError: It is compiled to TorchScript, or has lazy layers.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            f"The factory {head} returned a TorchScript module, whose layers cannot be replaced; "
            "let it return the network before torch.jit.script or torch.jit.trace."
        )
    lazy = [n for n, m in module.named_modules() if isinstance(m, LazyModuleMixin)]
    if lazy:
        raise ModelError(
            f"The factory {head} returned a network with layers that wait for their first input "
            f"({', '.join(lazy[:5])}); let it run one forward before it returns."
        )
