"""Libraries whose networks a model spec names: ``torchvision:resnet18``, ``timm:resnet50``, ...

To add one, write a file with a `Library` in it and add it to `LIBRARIES`.
"""

from __future__ import annotations

from compress.libraries.hf import HF
from compress.libraries.onnx import ONNX
from compress.libraries.record import FromLibrary, Library
from compress.libraries.smp import SMP
from compress.libraries.timm import TIMM
from compress.libraries.torchvision import TORCHVISION

__all__ = ["LIBRARIES", "FromLibrary", "Library", "library_of"]

LIBRARIES: tuple[Library, ...] = (TORCHVISION, TIMM, SMP, HF, ONNX)


def library_of(head: str) -> tuple[Library, str] | None:
    """Return the library that a spec without its arguments names, and the name in it.

    Args:
        head: Such as ``"timm:resnet50"``.

    Returns:
        None for a spec of the user's own code.
    """
    prefix, colon, name = head.partition(":")
    found = next((each for each in LIBRARIES if each.prefix == prefix), None) if colon else None
    return None if found is None else (found, name)
