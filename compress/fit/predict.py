"""What the statistics predict for a replaced layer, on the rows seen and on held-out ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.calibrate.collect import calibrate
from compress.calibrate.statistics import Calibration, LayerStatistics
from compress.config import RunConfig
from compress.data import ImageSet, batches
from compress.layers import kind_of
from compress.linalg.fit import Fit, Problem
from compress.linalg.moments import Moments
from compress.linalg.schemes import SCHEME_NAMES
from compress.network.baseline import Network


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
    """

    loss: float
    mse: float
    relative_mse: float | None
    eigenvalues: tuple[float, ...]
    samples: int
    samples_per_dimension: float
    held_out_mse: float | None = None


def held_out_statistics(
    network: Network,
    names: list[str],
    calibration: Calibration,
    config: RunConfig,
    images: ImageSet,
    batch_size: int,
) -> dict[str, LayerStatistics]:
    """Statistics of some layers on held-out images, of the same side as on the fit images."""
    patches = [n for n in names if calibration.statistics[n].inputs is not None]
    found: dict[str, LayerStatistics] = {}
    for group, schemes in ((patches, SCHEME_NAMES), ([n for n in names if n not in patches], ())):
        sites = [site for site in network.sites if site.name in group]
        if sites:
            loaded = batches(images, batch_size, config.workers)
            seen = calibrate(
                network.model, sites, loaded, len(images), schemes=schemes, weigh=False,
                samples_per_dimension=config.samples_per_dimension, seed=config.seed,
                memory_format=network.memory_format,
            )  # fmt: skip
            found |= seen.statistics
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
    kind = kind_of(module)
    assert kind is not None
    if statistics.inputs is not None:
        return kind.weight(module).double().flatten(2) - found.matrix, statistics.inputs
    assert statistics.outputs is not None
    assert found.projection is not None
    size, device = found.projection.shape[-1], found.matrix.device
    return torch.eye(
        size, dtype=torch.float64, device=device
    ) - found.projection, statistics.outputs
