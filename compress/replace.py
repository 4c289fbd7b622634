"""From a plan to a rewritten model: fitting the chosen factors, then refitting them in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.calibrate import (
    Calibration,
    LayerStatistics,
    absorbed_bias,
    fit_problem,
    layer_problem,
)
from compress.config import RunConfig
from compress.data import Split, batches
from compress.errors import ModelError
from compress.layers import kind_of
from compress.linalg.fit import Fit, Problem, fit
from compress.network import Network
from compress.plan import Plan
from compress.progress import Track
from compress.refit import Factors, refit
from compress.rewrite import rewrite
from compress.segments import refit_segments
from compress.sites import LayerSite


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
    """

    loss: float
    mse: float
    relative_mse: float | None
    eigenvalues: tuple[float, ...]
    samples: int
    samples_per_dimension: float


@dataclass(frozen=True)
class Replaced:
    """A rewritten model and what was predicted for it.

    Attributes:
        model: The rewritten model, float32.
        fitted: The same before the refit, whose per-layer errors the prediction is about.
        predicted: By layer name, for every layer with statistics.
        refitted: Names of the layers whose refit was kept.
    """

    model: nn.Module
    fitted: nn.Module
    predicted: dict[str, PredictedError]
    refitted: tuple[str, ...] = ()


def fit_plan(
    network: Network,
    plan: Plan,
    calibration: Calibration,
    config: RunConfig,
    split: Split,
    batch_size: int,
    track: Track,
) -> Replaced:
    """Fit every chosen scheme in the data's metric, rewrite the model, refit it in order.

    Args:
        network: The dense baseline.
        plan: What to do with each layer.
        calibration: The layers' statistics.
        config: Whether to refit, and the seed.
        split: Images that the refit is fitted to and judged on.
        batch_size: Images a batch.
        track: Progress.
    """
    sites = {site.name: site for site in network.sites}
    modules = dict(network.model.named_modules(remove_duplicate=False))
    factors: dict[str, Factors] = {}
    predicted: dict[str, PredictedError] = {}
    measured = [c for c in plan.choices if c.name in calibration.statistics]
    for choice in track(measured, "fit", len(measured)):
        site, module = sites[choice.name], modules[choice.name]
        statistics = calibration.statistics[choice.name]
        problem = layer_problem(site, module, statistics)
        loss = mse = 0.0
        if choice.rewritten:
            metric = fit_problem(site, module, statistics)
            found = fit(metric, choice.scheme, choice.ranks)
            loss, mse = seen_errors(module, statistics, problem, found)
            if statistics.pooled is not None:
                loss = found.loss
            bias = absorbed_bias(module, statistics, found)
            factors[choice.name] = Factors(found, bias, problem.weighting)
        variance = problem.variance()
        moments = statistics.inputs or statistics.outputs
        assert moments is not None
        predicted[choice.name] = PredictedError(
            loss=0.5 * site.positions * loss,
            mse=mse,
            relative_mse=mse / variance if variance > 1e-20 else None,
            eigenvalues=tuple(problem.plain_spectrum.flatten().sort(descending=True)[0].tolist()),
            samples=statistics.samples,
            samples_per_dimension=statistics.samples / moments.mean.shape[1],
        )
    fitted = rewrite(network.model, sites, {n: f.chain for n, f in factors.items()})
    if not (config.refit and factors and network.graph is not None and len(split.validation)):
        return Replaced(fitted, fitted, predicted)
    new = _refitted(network, sites, factors, config, split, batch_size, track)
    changed = tuple(name for name in factors if new[name] is not factors[name])
    model = rewrite(network.model, sites, {n: f.chain for n, f in new.items()})
    return Replaced(model, fitted, predicted, changed)


def loss_function(config: RunConfig) -> Any:
    """The user's own loss ``(outputs, labels) -> summed loss``, or None for sampled labels."""
    if not config.loss_fn:
        return None
    from compress.models import import_function  # only where it is asked for

    return import_function(config.loss_fn, ModelError)


def _refitted(
    network: Network,
    sites: dict[str, LayerSite],
    factors: dict[str, Factors],
    config: RunConfig,
    split: Split,
    batch_size: int,
    track: Track,
) -> dict[str, Factors]:
    """Refit layer by layer in execution order, then jointly between cuts of the graph."""
    assert network.graph is not None
    device = network.example.device
    fit_batches, validation = (
        batches(images, batch_size, config.workers) for images in (split.fit, split.validation)
    )
    found, _ = refit(
        network.model,
        network.graph,
        sites,
        factors,
        (images.to(device) for images, _ in fit_batches),
        (images.to(device) for images, _ in validation),
        seed=config.seed,
        track=track,
    )
    return refit_segments(
        network.model,
        network.graph,
        sites,
        found,
        fit_batches,
        validation,
        weigh=config.metric == "loss",
        loss=loss_function(config),
        seed=config.seed,
        track=track,
    )


def seen_errors(
    module: nn.Module, statistics: LayerStatistics, problem: Problem, found: Fit
) -> tuple[float, float]:
    """Weighted loss and mean squared error of a fit on the rows seen.

    Where few rows were seen the fit was made with a shrunk covariance, but what it does to those
    rows is a matter of the covariance as it was.
    """
    kind = kind_of(module)
    assert kind is not None
    if statistics.inputs is not None:
        delta = kind.weight(module).double().flatten(2) - found.matrix
        gram = delta @ statistics.inputs.covariance @ delta.mT
    else:
        assert statistics.outputs is not None
        assert found.projection is not None
        eye = torch.eye(found.projection.shape[-1], dtype=torch.float64, device=found.matrix.device)
        rest = eye - found.projection
        gram = rest @ statistics.outputs.covariance @ rest.mT
    loss = float((problem.weighting * gram).sum())
    mse = float(gram.diagonal(dim1=-2, dim2=-1).sum()) / problem.geometry.out_channels
    return max(loss, 0.0), max(mse, 0.0)
