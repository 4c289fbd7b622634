"""``torchvision:NAME``: the classification networks of torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.libraries.record import FromLibrary, Library
from compress.vision.torchvision import torchvision_model, torchvision_preset


def _build(name: str, arguments: dict[str, Any]) -> FromLibrary:
    module = torchvision_model(name, **arguments)
    image_size = getattr(module, "image_size", None)
    preset = torchvision_preset(name, image_size if isinstance(image_size, int) else None)
    side = preset.crop if isinstance(preset.crop, int) else 224
    return FromLibrary(module, replace(preset, channels=3), (3, side, side))


def _risk(arguments: Mapping[str, Any]) -> str:
    if any(name.startswith("weights") for name in arguments):
        return "may download weights"
    # Numbers say how wide a network is and how many classes it has. Lists and names reach further:
    # a list of blocks a million long would be built block by block.
    plain = all(isinstance(value, bool | int | float) for value in arguments.values())
    return "" if plain else f"passes {dict(arguments)}"


TORCHVISION = Library("torchvision", "torchvision:resnet18", _build, _risk)
