"""A module behind one flat parameter vector, built on `torch.func.functional_call`."""

from __future__ import annotations

from compress.modules.flat.module import FlatModule
from compress.modules.flat.moving import from_reparam_state_dict, to_reparam_state_dict

# The name that torchreparam gives it.
ReparamModule = FlatModule

__all__ = ["FlatModule", "ReparamModule", "from_reparam_state_dict", "to_reparam_state_dict"]
