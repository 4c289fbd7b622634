"""From a model spec to a module: one of torchvision's, or what the user's own factory returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from compress.errors import ModelError
from compress.specs import call_factory, split_spec
from compress.vision.preprocessing import Preprocessing
from compress.vision.torchvision import torchvision_model, torchvision_preset

MODEL_FORMS = (
    "torchvision:resnet18, torchvision:vit_b_16?num_classes=10, "
    "package.module:factory?width=32 or path/to/file.py:factory"
)


@dataclass(frozen=True)
class BuiltModel:
    """A network in eval mode and float32, with random weights, and what its spec says of it.

    Attributes:
        module: The network.
        spec: The spec it was built from.
        preset: The preprocessing of torchvision's default weights, None for other models.
        input_shape: One input without the batch axis, ``(C, H, W)``: torchvision's preset, or the
            module's attribute ``input_shape``; None where neither is there.
    """

    module: nn.Module
    spec: str
    preset: Preprocessing | None
    input_shape: tuple[int, ...] | None


def build_model(spec: str) -> BuiltModel:
    """Build the network that a spec names.

    The global random state is left as it was, and the network is the same every time.

    Raises:
        ModelError: The spec is malformed, names nothing that exists, or its factory fails or
            returns no ``nn.Module``. The message says which and names near matches.
    """
    head, arguments = split_spec(spec, ModelError)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if head.startswith("torchvision:"):
            return _build_torchvision(spec, head.removeprefix("torchvision:"), arguments)
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
    return BuiltModel(
        module=module.float().eval(),
        spec=spec,
        preset=None,
        input_shape=tuple(int(n) for n in hint) if isinstance(hint, tuple | list) else None,
    )


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


def _build_torchvision(spec: str, name: str, arguments: dict[str, Any]) -> BuiltModel:
    module = torchvision_model(name, **arguments)
    image_size = getattr(module, "image_size", None)
    preset = torchvision_preset(name, image_size if isinstance(image_size, int) else None)
    side = preset.crop or 224
    return BuiltModel(
        module=module.float().eval(),
        spec=spec,
        preset=replace(preset, channels=3),
        input_shape=(3, side, side),
    )
