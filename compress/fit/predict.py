"""What the statistics predict for a replaced layer, on the rows seen and on held-out ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.calibrate.collect import calibrate
from compress.calibrate.recipe import Recipe
from compress.calibrate.removal import Lost
from compress.calibrate.statistics import LayerStatistics, Source
from compress.data import ImageSet, Loader
from compress.layers import registered_kind
from compress.linalg.fit import Fit, Problem
from compress.linalg.moments import Moments
from compress.linalg.schemes import SCHEME_NAMES
from compress.network.baseline import Network


@dataclass(frozen=True)
class HeldOut:
    """Images that a fit was not made of.

    Attributes:
        images: The images.
        loader: How they reach the network.
        recipe: How statistics of the fit images were taken.
    """

    images: ImageSet
    loader: Loader
    recipe: Recipe


@dataclass(frozen=True)
class PredictedError:
    """What the statistics predict for one replaced layer, before any refit.

    Attributes:
        loss: Increase of the objective per image, ``½ N tr(G Δ C Δᵀ)``.
        mse: Mean squared error per output element.
        relative_mse: The same over the output's variance; None where that is zero.
        eigenvalues: The spectrum of the outputs' covariance, group by group, descending.
        samples: Rows the statistics were taken from.
        samples_per_dimension: The same over the length of a row.
        held_out_mse: `mse` for rows of the validation images, where samples were few.
        variance: The output's, per element.
    """

    loss: float
    mse: float
    relative_mse: float | None
    eigenvalues: tuple[float, ...]
    samples: int
    samples_per_dimension: float
    held_out_mse: float | None = None
    variance: float = 0.0

    def with_lost(self, lost: Lost | None) -> PredictedError:
        """The same with what the layer loses by fewer inputs."""
        if lost is None:
            return self
        mse = self.mse + lost.mse
        relative = mse / self.variance if self.variance > 1e-20 else None
        return replace(self, loss=self.loss + lost.loss, mse=mse, relative_mse=relative)


def held_out_statistics(
    network: Network, seen: Mapping[str, LayerStatistics], images: HeldOut
) -> dict[str, LayerStatistics]:
    """Statistics of some layers on held-out images, of the same side as on the fit images.

    Args:
        network: The dense baseline.
        seen: Statistics of these layers on the fit images.
        images: The others.
    """
    found: dict[str, LayerStatistics] = {}
    of_patches = [name for name, statistics in seen.items() if statistics.inputs is not None]
    of_outputs = [name for name in seen if name not in of_patches]
    for group, schemes in ((of_patches, SCHEME_NAMES), (of_outputs, ())):
        sites = [site for site in network.sites if site.name in group]
        if sites:
            # What was seen may come from a file that holds more than this run asks for.
            readers = frozenset(name for name in group if name in of_patches)
            recipe = replace(
                images.recipe, schemes=schemes, weigh=False, pool=False, readers=readers
            )
            source = Source(len(images.images), memory_format=network.memory_format)
            loaded = images.loader.batches(images.images)
            found |= calibrate(network.model, sites, loaded, source, recipe).statistics
    return found


def unseen_mse(
    module: nn.Module, found: Fit, seen: LayerStatistics, unseen: LayerStatistics
) -> float:
    """Mean squared error of a fit on rows that it was not made of.

    ``tr(Δ C Δᵀ)`` over their covariance, and what the bias, which absorbed the mean of the rows
    seen, lacks on theirs: ``|Δ (m - m_seen)|²``.
    """
    delta, before = _lost(module, seen, found)
    _, after = _lost(module, unseen, found)
    spread = (delta @ after.covariance @ delta.mT).diagonal(dim1=-2, dim2=-1).sum()
    shift = (delta @ (after.mean - before.mean).unsqueeze(2)).square().sum()
    return float(spread + shift) / (delta.shape[0] * delta.shape[1])


def seen_errors(
    module: nn.Module, statistics: LayerStatistics, problem: Problem, found: Fit
) -> tuple[float, float]:
    """Weighted loss and mean squared error of a fit on the rows seen.

    Where few rows were seen the fit was made with a shrunk covariance, but what it does to those
    rows is a matter of the covariance as it was.
    """
    delta, moments = _lost(module, statistics, found)
    gram = delta @ moments.covariance @ delta.mT
    loss = float((problem.weighting * gram).sum())
    mse = float(gram.diagonal(dim1=-2, dim2=-1).sum()) / problem.geometry.out_channels
    return max(loss, 0.0), max(mse, 0.0)


def _lost(module: nn.Module, statistics: LayerStatistics, found: Fit) -> tuple[Tensor, Moments]:
    """What a fit takes from a row, ``W - Ŵ`` of patches or ``I - P`` of outputs; their moments."""
    kind = registered_kind(module)
    if statistics.inputs is not None:
        return kind.weight(module).double().flatten(2) - found.matrix, statistics.inputs
    if found.projection is None:
        raise ValueError("the error of a general approximation needs the patches' statistics")
    size, device = found.projection.shape[-1], found.matrix.device
    eye = torch.eye(size, dtype=torch.float64, device=device)
    return eye - found.projection, statistics.rows
