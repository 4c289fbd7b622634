"""What calibration learns about layers, as records."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from compress.linalg.moments import Moments
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
        pooled: Moments of rows pooled by gradient, see `compress.calibrate.pooled`, or None.
    """

    inputs: Moments | None = None
    outputs: Moments | None = None
    weighting: Moments | None = None
    pooled: Moments | None = None

    @property
    def samples(self) -> int:
        """Rows seen."""
        moments = self.inputs or self.outputs
        return 0 if moments is None else moments.count

    def moments(self) -> dict[str, Moments]:
        """The moments there are, by role."""
        roles = {
            "inputs": self.inputs,
            "outputs": self.outputs,
            "weighting": self.weighting,
            "pooled": self.pooled,
        }
        return {role: m for role, m in roles.items() if m is not None}

    def merge(self, other: LayerStatistics) -> None:
        """Add the statistics of another process or an earlier run."""
        theirs = other.moments()
        for role, moments in self.moments().items():
            moments.merge(theirs[role])


@dataclass
class Calibration:
    """Statistics by site name, with what they were taken from."""

    statistics: dict[str, LayerStatistics]
    images: int
    metric: str
    data_fingerprint: str = ""
    model_fingerprint: str = ""
    warnings: list[str] = field(default_factory=list)


def without_unseen(network: Network, calibration: Calibration) -> Network:
    """Keep the layers that no calibration image reached: nothing is known of what they do."""
    unseen = {name for name, found in calibration.statistics.items() if not found.samples}
    reason = "no calibration image reached it (the model chooses its layers by its input)"
    sites = tuple(replace(s, skip=reason) if s.name in unseen else s for s in network.sites)
    return replace(network, sites=sites)
