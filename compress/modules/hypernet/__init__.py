"""Networks whose chosen weights come from another network.

After HyperLight and Gonzalez Ortiz, Guttag and Dalca, "Non-Proportional Parametrizations for
Stable Hypernetwork Learning", arXiv 2304.07645.
"""

from __future__ import annotations

from compress.modules.hypernet.batch import per_sample
from compress.modules.hypernet.convert import hypernetize, hypernetize_single
from compress.modules.hypernet.encoding import encode
from compress.modules.hypernet.external import HyperModule
from compress.modules.hypernet.find import (
    find_modules_from_patterns,
    find_modules_of_type,
    find_parameters_from_patterns,
)
from compress.modules.hypernet.hyperlight import (
    state_dict_from_hyperlight,
    state_dict_to_hyperlight,
)
from compress.modules.hypernet.layers import HyperConv1d, HyperConv2d, HyperConv3d, HyperLinear
from compress.modules.hypernet.network import HyperNet, Hypernet
from compress.modules.hypernet.slot import ExternalParameter

__all__ = [
    "ExternalParameter",
    "HyperConv1d",
    "HyperConv2d",
    "HyperConv3d",
    "HyperLinear",
    "HyperModule",
    "HyperNet",
    "Hypernet",
    "encode",
    "find_modules_from_patterns",
    "find_modules_of_type",
    "find_parameters_from_patterns",
    "hypernetize",
    "hypernetize_single",
    "per_sample",
    "state_dict_from_hyperlight",
    "state_dict_to_hyperlight",
]
