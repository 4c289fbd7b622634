"""How each layer kind is read, rebuilt and seen as a convolution.

A new kind is one file and one line here; the contract suite then tests it.
"""

from __future__ import annotations

from compress.layers.convolution import CONV1D, CONV2D, CONV3D
from compress.layers.linear import LINEAR
from compress.layers.registry import LayerKind, kind_of, register, registered, registered_kind
from compress.layers.transposed import CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, CONV_TRANSPOSE3D

for _kind in (
    CONV1D, CONV2D, CONV3D, CONV_TRANSPOSE1D, CONV_TRANSPOSE2D, CONV_TRANSPOSE3D, LINEAR,
):  # fmt: skip
    register(_kind)

__all__ = ["LayerKind", "kind_of", "registered", "registered_kind"]
