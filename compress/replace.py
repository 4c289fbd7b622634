"""From a plan to a rewritten model: fitting the chosen factors, then refitting them in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.calibrate import calibrate
from compress.config import SCHEMES, RunConfig
from compress.data import ImageSet, Split, batches
from compress.latency.formats import in_format, in_memory_format
from compress.layers import kind_of
from compress.linalg.fit import Fit, Problem, fit
from compress.loss import loss_function
from compress.metric import absorbed_bias, fit_problem, layer_problem
from compress.network import Network
from compress.plan import Plan
from compress.progress import Track
from compress.refit import Factors, refit
from compress.rewrite import rewrite
from compress.segments import refit_segments
from compress.sites import LayerSite
from compress.statistics import FEW_SAMPLES, Calibration, LayerStatistics


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
        held_out_mse: The same for rows of the validation images, where samples were few.
    """

    loss: float
    mse: float
    relative_mse: float | None
    eigenvalues: tuple[float, ...]
    samples: int
    samples_per_dimension: float
    held_out_mse: float | None = None


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
            metric = fit_problem(site, module, statistics) if config.pools else problem
            found = fit(metric, choice.scheme, choice.ranks)
            loss, mse = seen_errors(module, statistics, problem, found)
            if metric is not problem:
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
    few = [n for n in factors if predicted[n].samples_per_dimension < FEW_SAMPLES]
    if few and len(split.validation):
        held_out = _held_out(network, few, calibration, config, split.validation, batch_size)
        for name in few:
            mse = unseen_mse(
                modules[name], factors[name].fit, calibration.statistics[name], held_out[name]
            )
            predicted[name] = dataclasses.replace(predicted[name], held_out_mse=mse)
    fitted = rewrite(network.model, sites, {n: f.chain for n, f in factors.items()})
    if not (config.refit and factors and network.graph is not None and len(split.validation)):
        return Replaced(fitted, fitted, predicted)
    new = _refitted(network, sites, factors, config, split, batch_size, track)
    changed = tuple(name for name in factors if new[name] is not factors[name])
    model = rewrite(network.model, sites, {n: f.chain for n, f in new.items()})
    return Replaced(model, fitted, predicted, changed)


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
    device, form = network.example.device, network.memory_format

    def loaded(images: ImageSet) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels in batches(images, batch_size, config.workers):
            yield in_format(inputs.to(device), form), labels

    with in_memory_format(network.model, form):
        found, _ = refit(
            network.model,
            network.graph,
            sites,
            factors,
            (images for images, _ in loaded(split.fit)),
            (images for images, _ in loaded(split.validation)),
            seed=config.seed,
            track=track,
        )
        return refit_segments(
            network.model,
            network.graph,
            sites,
            found,
            loaded(split.fit),
            loaded(split.validation),
            weigh=config.metric == "loss",
            loss=loss_function(config),
            seed=config.seed,
            track=track,
        )


def _held_out(
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
    for group, schemes in ((patches, SCHEMES), ([n for n in names if n not in patches], ())):
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
    kind = kind_of(module)
    assert kind is not None
    if seen.inputs is not None and unseen.inputs is not None:
        delta = kind.weight(module).double().flatten(2) - found.matrix
        before, after = seen.inputs, unseen.inputs
    else:
        assert found.projection is not None
        assert seen.outputs is not None
        assert unseen.outputs is not None
        before, after = seen.outputs, unseen.outputs
        size = found.projection.shape[-1]
        eye = torch.eye(size, dtype=torch.float64, device=found.matrix.device)
        delta = eye - found.projection
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
