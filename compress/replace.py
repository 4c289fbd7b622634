"""From a plan to a rewritten model: fitting the chosen factors, then refitting them in order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from compress.calibrate import Calibration, absorbed_bias, layer_problem
from compress.config import RunConfig
from compress.linalg.fit import fit
from compress.network import Network
from compress.plan import Plan
from compress.progress import Track
from compress.rewrite import Chain, rewrite


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
    track: Track,
) -> Replaced:
    """Fit every chosen scheme in the data's metric and rewrite the model."""
    sites = {site.name: site for site in network.sites}
    modules = dict(network.model.named_modules(remove_duplicate=False))
    chains: dict[str, Chain] = {}
    predicted: dict[str, PredictedError] = {}
    measured = [c for c in plan.choices if c.name in calibration.statistics]
    for choice in track(measured, "fit", len(measured)):
        site, module = sites[choice.name], modules[choice.name]
        statistics = calibration.statistics[choice.name]
        problem = layer_problem(site, module, statistics)
        loss = mse = 0.0
        if choice.rewritten:
            found = fit(problem, choice.scheme, choice.ranks)
            loss, mse = 0.5 * site.positions * found.loss, found.mse
            bias = absorbed_bias(module, statistics, found)
            chains[choice.name] = Chain(found.scheme, found.ranks, found.weights, bias)
        variance = problem.variance()
        moments = statistics.inputs or statistics.outputs
        assert moments is not None
        predicted[choice.name] = PredictedError(
            loss=loss,
            mse=mse,
            relative_mse=mse / variance if variance > 1e-20 else None,
            eigenvalues=tuple(problem.plain_spectrum.flatten().sort(descending=True)[0].tolist()),
            samples=statistics.samples,
            samples_per_dimension=statistics.samples / moments.mean.shape[1],
        )
    fitted = rewrite(network.model, sites, chains)
    return Replaced(fitted, fitted, predicted)
