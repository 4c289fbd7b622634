"""What calibration learns about layers, as records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from compress.linalg.geometry import Geometry
from compress.linalg.moments import Moments
from compress.linalg.selection import Removal
from compress.network.baseline import Network

# Below this many samples a dimension the covariance is shrunk and the user is warned.
FEW_SAMPLES = 10


@dataclass
class LayerStatistics:
    """What calibration learned about one layer.

    Attributes:
        inputs: Moments of its patches, or None where outputs were the cheaper side.
        outputs: Moments of its outputs, or None where `inputs` give them.
        weighting: Moments of the gradients at its outputs, or None for the plain metric.
        pooled: Moments of centred rows pooled by gradient, see `compress.calibrate.pooled`, or
            None.
    """

    inputs: Moments | None = None
    outputs: Moments | None = None
    weighting: Moments | None = None
    pooled: Moments | None = None

    def to(self, device: torch.device) -> LayerStatistics:
        """Return the same on a device."""
        kinds = (self.inputs, self.outputs, self.weighting, self.pooled)
        return LayerStatistics(*(kind and kind.to(device) for kind in kinds))

    @property
    def rows(self) -> Moments:
        """The moments of whichever rows were taken.

        Raises:
            ValueError: There are none.
        """
        moments = self.inputs or self.outputs
        if moments is None:
            raise ValueError("no rows of this layer were taken")
        return moments

    @property
    def samples(self) -> int:
        """Rows seen."""
        return self.rows.count

    @property
    def samples_per_dimension(self) -> float:
        """Rows seen, over their length."""
        return self.samples / self.rows.mean.shape[1]

    def moments(self) -> dict[str, Moments]:
        """The moments there are, by role."""
        roles = {
            "inputs": self.inputs,
            "outputs": self.outputs,
            "weighting": self.weighting,
            "pooled": self.pooled,
        }
        return {role: m for role, m in roles.items() if m is not None}


@dataclass(frozen=True)
class Source:
    """What statistics are taken from.

    Attributes:
        images: How many images.
        data: Their fingerprint.
        model: The model's.
        memory_format: What the model runs in meanwhile, as `Network.memory_format`.
    """

    images: int
    data: str = ""
    model: str = ""
    memory_format: str = "contiguous"


@dataclass(frozen=True)
class Calibration:
    """Statistics of a network, made once.

    Attributes:
        statistics: By site name.
        source: What they were taken from.
        metric: ``"loss"`` or ``"mse"``.
        removals: The orders in which channels of a group can go, as far as they were worked out
            of the statistics (`compress.calibrate.removal`), by group.
        fits: What became of each layer when it was last fitted to its statistics
            (`compress.fit.layers`), by name.
    """

    statistics: Mapping[str, LayerStatistics]
    source: Source
    metric: str
    removals: dict[tuple[str, str], Removal] = field(
        default_factory=dict, repr=False, compare=False
    )
    fits: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device) -> Calibration:
        """Return the statistics on a device, as those of a file are to be."""
        return replace(self, statistics={n: s.to(device) for n, s in self.statistics.items()})


def without_unseen(network: Network, calibration: Calibration) -> Network:
    """Keep the layers that no calibration image reached: nothing is known of what they do."""
    unseen = {name for name, found in calibration.statistics.items() if not found.samples}
    reason = "no calibration image reached it (the model chooses its layers by its input)"
    sites = tuple(replace(s, skip=reason) if s.name in unseen else s for s in network.sites)
    return replace(network, sites=sites)


def misfits(network: Network, calibration: Calibration) -> list[str]:
    """Return the names of layers whose statistics are missing or of another shape than the layer.

    Statistics that were read from a file may be of anything.
    """
    return [
        site.name
        for site in network.sites
        if site.skip is None and not _fits(site.geometry, calibration.statistics.get(site.name))
    ]


def _fits(geometry: Geometry, statistics: LayerStatistics | None) -> bool:
    if statistics is None:
        return False
    rows = geometry.out_features if statistics.inputs is None else geometry.in_features
    features = {
        "inputs": geometry.in_features,
        "outputs": geometry.out_features,
        "weighting": geometry.out_features,
        "pooled": rows + 1,  # with the gradients' own sum at the end
    }
    return all(
        moments.mean.shape == (geometry.groups, features[role])
        for role, moments in statistics.moments().items()
    )
