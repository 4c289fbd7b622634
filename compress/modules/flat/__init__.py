"""A module behind one flat parameter vector, built on `torch.func.functional_call`."""

from __future__ import annotations

from compress.modules.flat.module import FlatModule

__all__ = ["FlatModule"]
