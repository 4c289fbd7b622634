"""compress: post-training low-rank compression of PyTorch networks, with proof.

The public names load on first use, so that ``import compress`` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "compress_model": "compress.pipeline.run",
    "load": "compress.artefact.model",
    "combine": "compress.linalg.convolution",
    "Mirror": "compress.network.mirror",
    "RunConfig": "compress.config",
}
__all__ = ["Mirror", "RunConfig", "__version__", "combine", "compress_model", "load"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'compress' has no attribute {name!r}")
