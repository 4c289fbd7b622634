"""Linear layers trained as chains and used as the single layer they equal.

After Huh et al., "The Low-Rank Simplicity Bias in Deep Networks", TMLR 2023.
"""

from __future__ import annotations

from compress.modules.overparam.conv import OverparamConv2d
from compress.modules.overparam.convert import collapse, overparameterize
from compress.modules.overparam.layer import OverparamLayer
from compress.modules.overparam.linear import OverparamLinear
from compress.modules.overparam.moving import from_overparam_state_dict, to_overparam_state_dict

__all__ = [
    "OverparamConv2d",
    "OverparamLayer",
    "OverparamLinear",
    "collapse",
    "from_overparam_state_dict",
    "overparameterize",
    "to_overparam_state_dict",
]
