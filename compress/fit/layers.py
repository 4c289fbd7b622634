"""From a plan to a rewritten model: fitting the chosen factors, then refitting them in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from compress.calibrate.problems import absorbed_bias, fit_problem, layer_problem
from compress.calibrate.statistics import FEW_SAMPLES, Calibration, LayerStatistics
from compress.config import RunConfig
from compress.data import ImageSet, Split, batches
from compress.fit.in_order import Factors, refit
from compress.fit.jointly import Improved, refit_segments
from compress.fit.predict import PredictedError, held_out_statistics, seen_errors, unseen_mse
from compress.inputs.functions import loss_function
from compress.linalg.fit import fit
from compress.network.baseline import Network
from compress.network.chains import rewrite
from compress.network.sites import LayerSite
from compress.plan import Choice, Plan
from compress.progress import Track
from compress.running.memory_format import in_format, in_memory_format


@dataclass(frozen=True)
class Replaced:
    """A rewritten model and what was predicted for it.

    Attributes:
        model: The rewritten model, float32.
        fitted: The same before the refit, whose per-layer errors the prediction is about.
        predicted: By layer name, for every layer with statistics.
        refitted: Names of the layers whose refit was kept, dense ones included.
    """

    model: nn.Module
    fitted: nn.Module
    predicted: dict[str, PredictedError]
    refitted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fitted:
    """The factors of a plan's replaced layers, fitted to the statistics.

    Attributes:
        factors: By layer name.
        predicted: By layer name, for every layer with statistics.
        free: Names of the dense layers whose weights a refit may change.
    """

    factors: dict[str, Factors]
    predicted: dict[str, PredictedError]
    free: tuple[str, ...] = ()


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
    fitted = fit_layers(network, plan, calibration, config, split, batch_size, track)
    return replace_layers(network, fitted, config, split, batch_size, track)


def fit_layers(
    network: Network,
    plan: Plan,
    calibration: Calibration,
    config: RunConfig,
    split: Split,
    batch_size: int,
    track: Track,
) -> Fitted:
    """Fit every chosen scheme to the statistics alone; arguments as `fit_plan`."""
    sites = {site.name: site for site in network.sites}
    modules = dict(network.model.named_modules(remove_duplicate=False))
    factors: dict[str, Factors] = {}
    predicted: dict[str, PredictedError] = {}
    measured = [c for c in plan.choices if c.name in calibration.statistics]
    for choice in track(measured, "fit", len(measured)):
        site, module = sites[choice.name], modules[choice.name]
        found, predicted[choice.name] = _fit_layer(
            site, module, calibration.statistics[choice.name], choice, config
        )
        if found is not None:
            factors[choice.name] = found
    few = [n for n in factors if predicted[n].samples_per_dimension < FEW_SAMPLES]
    if few and len(split.validation):
        held_out = held_out_statistics(
            network, few, calibration, config, split.validation, batch_size
        )
        for name in few:
            mse = unseen_mse(
                modules[name], factors[name].fit, calibration.statistics[name], held_out[name]
            )
            predicted[name] = dataclasses.replace(predicted[name], held_out_mse=mse)
    free = [
        c.name for c in plan.choices
        if not c.rewritten and not c.locked and sites[c.name].skip is None
    ]  # fmt: skip
    return Fitted(factors, predicted, tuple(free))


def _fit_layer(
    site: LayerSite,
    module: nn.Module,
    statistics: LayerStatistics,
    choice: Choice,
    config: RunConfig,
) -> tuple[Factors | None, PredictedError]:
    problem = layer_problem(site, module, statistics)
    factors, loss, mse = None, 0.0, 0.0
    if choice.rewritten:
        metric = fit_problem(site, module, statistics) if config.pools else problem
        found = fit(metric, choice.scheme, choice.ranks)
        loss, mse = seen_errors(module, statistics, problem, found)
        if metric is not problem:
            loss = found.loss
        bias = absorbed_bias(module, statistics, found)
        factors = Factors(found, bias, problem.weighting)
    variance = problem.variance()
    moments = statistics.inputs or statistics.outputs
    assert moments is not None
    return factors, PredictedError(
        loss=0.5 * site.positions * loss,
        mse=mse,
        relative_mse=mse / variance if variance > 1e-20 else None,
        eigenvalues=tuple(problem.plain_spectrum.flatten().sort(descending=True)[0].tolist()),
        samples=statistics.samples,
        samples_per_dimension=statistics.samples / moments.mean.shape[1],
    )


def replace_layers(
    network: Network,
    fitted: Fitted,
    config: RunConfig,
    split: Split,
    batch_size: int,
    track: Track,
) -> Replaced:
    """Rewrite the model with fitted factors, and refit them; arguments as `fit_plan`."""
    sites, factors = {site.name: site for site in network.sites}, fitted.factors
    first = rewrite(network.model, sites, {n: f.chain for n, f in factors.items()})
    if not (config.refit and factors and network.graph is not None and len(split.validation)):
        return Replaced(first, first, fitted.predicted)
    new = _refitted(network, sites, fitted, config, split, batch_size, track)
    changed = tuple(name for name in factors if new.factors[name] is not factors[name])
    chains = {n: f.chain for n, f in new.factors.items()}
    model = rewrite(network.model, sites, chains, new.kept)
    changed += tuple(new.kept)
    return Replaced(model, first, fitted.predicted, changed)


def _refitted(
    network: Network,
    sites: dict[str, LayerSite],
    fitted: Fitted,
    config: RunConfig,
    split: Split,
    batch_size: int,
    track: Track,
) -> Improved:
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
            fitted.factors,
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
            free=fitted.free,
            weigh=config.metric == "loss",
            loss=loss_function(config),
            seed=config.seed,
            track=track,
        )
