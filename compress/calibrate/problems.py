"""One layer's weight in the metric of what calibration learned about it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.calibrate.pooled import pooled_covariance
from compress.calibrate.statistics import FEW_SAMPLES, LayerStatistics
from compress.layers import registered_kind
from compress.linalg.fit import Covariances, Fit, Problem
from compress.linalg.moments import Moments
from compress.linalg.spectrum import shrink, shrinkage
from compress.network.sites import LayerSite


def layer_problem(site: LayerSite, module: nn.Module, statistics: LayerStatistics) -> Problem:
    """Return a layer's weight in the metric of its statistics.

    Covariances from fewer than `FEW_SAMPLES` rows a dimension are shrunk first.
    """
    kind = registered_kind(module)
    weight = kind.weight(module).double()
    rows = _robust(statistics.rows)
    of_outputs = statistics.inputs is None
    weighting = statistics.weighting
    metric = weighting.second_moment if weighting is not None and weighting.count else None
    mean = None if statistics.inputs is None else statistics.inputs.mean
    covariances = Covariances(rows) if of_outputs else Covariances(None, rows, mean)
    return Problem(site.geometry, weight, covariances, metric)


def fit_problem(site: LayerSite, module: nn.Module, statistics: LayerStatistics) -> Problem:
    """Return a layer's weight in the metric that budgets and fits use.

    Where rows were pooled by gradient, the covariance is theirs (see `compress.calibrate.pooled`),
    scaled so that ``½ N tr(G Δ C Δᵀ)`` is still the increase of the loss per image; else
    `layer_problem`.
    """
    plain = layer_problem(site, module, statistics)
    pooled = statistics.pooled
    if pooled is None or not pooled.count or not bool(pooled.second_moment.any()):
        return plain
    seen = plain.output_covariance if plain.input_covariance is None else plain.input_covariance
    found, share = pooled_covariance(pooled, seen)
    channels = site.geometry.out_features
    trace = plain.weighting.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    # tr(G ⊗ C) becomes the mean squared norm of the weight's gradient, over N positions.
    metric = plain.weighting / trace * share * (channels * len(site.calls) / site.positions)
    of_outputs = plain.input_covariance is None
    covariances = Covariances(found) if of_outputs else Covariances(None, found, plain.input_mean)
    return Problem(site.geometry, plain.weight, covariances, metric)


def _robust(moments: Moments) -> Tensor:
    covariance = moments.covariance
    if moments.count >= FEW_SAMPLES * covariance.shape[-1]:
        return covariance
    return shrink(covariance, shrinkage(covariance, moments.count))


def bias_of(module: nn.Module) -> Tensor:
    """A layer's bias ``[c_out]`` in float64; zeros where it has none."""
    weight = registered_kind(module).weight(module)
    bias = module._parameters.get("bias")
    if bias is None:
        return weight.new_zeros(weight.shape[0] * weight.shape[1], dtype=torch.float64)
    return bias.detach().double()


def absorbed_bias(module: nn.Module, statistics: LayerStatistics, fit: Fit) -> Tensor:
    """Bias ``[c_out]`` that keeps the mean output exact: ``b + (W - Ŵ) m``.

    Where only the outputs' mean ``μ`` was taken it is the same ``μ + P (b - μ)``.
    """
    matrix = registered_kind(module).weight(module).double().flatten(2)
    old = bias_of(module).view(*matrix.shape[:2])
    if statistics.inputs is not None:
        mean = statistics.inputs.mean.unsqueeze(2)
        return (old + ((matrix - fit.matrix) @ mean).squeeze(2)).flatten()
    if fit.projection is None or statistics.outputs is None:
        raise ValueError("the bias of a general approximation needs the patches' mean")
    mean = statistics.outputs.mean
    return (mean + (fit.projection @ (old - mean).unsqueeze(2)).squeeze(2)).flatten()
