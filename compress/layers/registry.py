"""The one registry: from an exact ``nn.Module`` type to the functions that handle it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from compress.linalg.geometry import Geometry


@dataclass(frozen=True)
class LayerKind:
    """What the compressor needs to know about one type of layer.

    Attributes:
        module_type: The exact type; a subclass may change ``forward`` and is kept.
        geometry: Reads the geometry of a module.
        weight: Reads its weight as ``[groups, out, in, *kernel]`` (a view where possible).
        build: Builds a layer of this kind from a geometry, such a weight and a bias or None.
        unsupported: Says why a module cannot be rewritten, or None.
        images: Brings an activation of the layer to ``[batch, channels, *size]`` with the axes of
            the geometry, where ``batch`` counts the images and every further position is spatial.
    """

    module_type: type[nn.Module]
    geometry: Callable[[nn.Module], Geometry]
    weight: Callable[[nn.Module], Tensor]
    build: Callable[[Geometry, Tensor, Tensor | None], nn.Module]
    unsupported: Callable[[nn.Module], str | None]
    images: Callable[[Tensor], Tensor]

    @property
    def name(self) -> str:
        """The name of the type, as torch spells it."""
        return self.module_type.__name__


_KINDS: dict[type[nn.Module], LayerKind] = {}


def register(kind: LayerKind) -> None:
    """Add a kind; a second one for the same type raises ``ValueError``."""
    if kind.module_type in _KINDS:
        raise ValueError(f"{kind.name} is registered already")
    _KINDS[kind.module_type] = kind


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind of a module's exact type, or None."""
    return _KINDS.get(type(module))


def registered_kind(module: nn.Module) -> LayerKind:
    """Return the kind of a module that is known to have one.

    Raises:
        ValueError: It has none.
    """
    kind = kind_of(module)
    if kind is None:
        raise ValueError(f"{type(module).__name__} is not a registered kind of layer")
    return kind


def kind_for(geometry: Geometry) -> LayerKind:
    """Return the kind that builds layers of a geometry."""
    return next(k for k in _KINDS.values() if _TYPE_NAMES[geometry.kind] == k.name)


def registered() -> tuple[LayerKind, ...]:
    """All kinds, in order of registration."""
    return tuple(_KINDS.values())


_TYPE_NAMES = {
    "linear": "Linear",
    "conv1d": "Conv1d",
    "conv2d": "Conv2d",
    "conv3d": "Conv3d",
    "conv_transpose1d": "ConvTranspose1d",
    "conv_transpose2d": "ConvTranspose2d",
    "conv_transpose3d": "ConvTranspose3d",
}
