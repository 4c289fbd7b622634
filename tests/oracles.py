"""Slow and obviously correct: every row materialised, loops, float64, no code of the package."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def weight_index(layer: nn.Module, group: int, out: int, feature: int) -> tuple[int, ...]:
    """Where the weight from patch feature ``(channel, row, column)`` to an output is stored."""
    weight = layer.weight
    groups = getattr(layer, "groups", 1)
    taps = tuple(weight.shape[2:])
    if isinstance(layer, Transposed):
        inputs = weight.shape[0] // groups
        channel, *tap = _unravel(feature, (inputs, *taps))
        return (group * inputs + channel, out, *tap)
    outputs = weight.shape[0] // groups
    channel, *tap = _unravel(feature, (weight.shape[1], *taps))
    return (group * outputs + out, channel, *tap)


def _unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return list(itertools.product(*map(range, shape)))[index]


def sizes(layer: nn.Module) -> tuple[int, int, int]:
    """Groups, outputs per group and patch length of a layer."""
    groups = getattr(layer, "groups", 1)
    outputs = getattr(layer, "out_channels", None) or layer.out_features
    return int(groups), int(outputs // groups), int(layer.weight.numel() // outputs)


def channels_last(layer: nn.Module, y: Tensor) -> Tensor:
    """Output ``[rows, channels]``, the images one after the other."""
    if not isinstance(layer, nn.Linear):
        y = y.movedim(1, -1)
    return y.reshape(-1, y.shape[-1])


def output_rows(layer: nn.Module, y: Tensor) -> Tensor:
    """``[groups, rows, outputs]`` of an output."""
    flat = channels_last(layer, y)
    groups, outputs, _ = sizes(layer)
    return torch.stack([flat[:, g * outputs : (g + 1) * outputs] for g in range(groups)])


def patch_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """``[groups, rows, features]``: the response to one weight of 1 at a time, by torch itself."""
    probe = copy.deepcopy(layer)
    groups, _, features = sizes(layer)
    columns = []
    with torch.no_grad():
        if probe.bias is not None:
            probe.bias.zero_()
        for feature in range(features):
            probe.weight.zero_()
            for group in range(groups):
                probe.weight[weight_index(probe, group, 0, feature)] = 1.0
            columns.append(output_rows(probe, probe(x))[:, :, 0])
    return torch.stack(columns, dim=2)


def matrix(layer: nn.Module) -> Tensor:
    """Weight as ``[groups, outputs, features]``."""
    groups, outputs, features = sizes(layer)
    result = torch.zeros(groups, outputs, features, dtype=layer.weight.dtype)
    for g, o, f in itertools.product(range(groups), range(outputs), range(features)):
        result[g, o, f] = layer.weight.detach()[weight_index(layer, g, o, f)]
    return result


def covariance(rows: Tensor) -> Tensor:
    """Population covariance of ``[groups, rows, features]``."""
    centred = rows - rows.mean(1, keepdim=True)
    return centred.mT @ centred / rows.shape[1]


def regularised(weighting: Tensor) -> Tensor:
    """The whole block-diagonal ``G`` plus 1e-6 of its mean eigenvalue; the identity for zero."""
    whole = torch.block_diag(*weighting)
    size = whole.shape[0]
    if whole.trace() == 0:
        whole = torch.eye(size, dtype=whole.dtype)
    else:
        whole = whole + 1e-6 * whole.trace() / size * torch.eye(size, dtype=whole.dtype)
    n = weighting.shape[1]
    return torch.stack([whole[i : i + n, i : i + n] for i in range(0, size, n)])


def spectrum(outputs: Tensor, weighting: Tensor) -> Tensor:
    """Eigenvalues of ``G^½ C G^½`` as squared singular values of the weighted rows.

    Args:
        outputs: ``[groups, rows, outputs]``.
        weighting: ``G``, positive definite; any root of it gives the same values.
    """
    centred = outputs - outputs.mean(1, keepdim=True)
    weighted = centred @ torch.linalg.cholesky(weighting)
    return torch.linalg.svdvals(weighted) ** 2 / outputs.shape[1]


def measured_errors(
    layer: nn.Module, other: nn.Module, x: Tensor, weighting: Tensor
) -> tuple[float, float]:
    """Weighted loss a position and mean squared error an element, by running both."""
    with torch.no_grad():
        error = output_rows(layer, other(x) - layer(x))
    loss = sum(
        float(row @ g @ row) for block, g in zip(error, weighting, strict=True) for row in block
    )
    return loss / error.shape[1], float((error**2).mean())


def last_factor_loss(
    layer: nn.Module, x: Tensor, first: Callable[[Tensor], Tensor], weighting: Tensor
) -> float:
    """Least weighted loss when everything after a first factor is free, bias included.

    Args:
        layer: The layer.
        x: Its inputs.
        first: From patch rows ``[groups, rows, features]`` to what the last factor reads.
        weighting: ``G``.
    """
    rows = first(patch_rows(layer, x))
    ones = torch.ones(*rows.shape[:2], 1, dtype=rows.dtype)
    read = torch.cat([rows, ones], dim=2)
    with torch.no_grad():
        wanted = output_rows(layer, layer(x))
    total = 0.0
    for group in range(len(read)):
        found = torch.linalg.lstsq(read[group], wanted[group], driver="gelsd").solution
        error = wanted[group] - read[group] @ found
        total += float(((error @ weighting[group]) * error).sum()) / len(error)
    return total


def _keep(
    kept: list[Tensor], module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    del module, inputs
    kept.append(output)
    return output.clone()  # in-place operations then spare what is kept


def weighting(
    model: nn.Module, name: str, x: Tensor, loss: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Second moment of the gradients at one layer's output, one image at a time by autograd.

    Args:
        model: The network.
        name: The layer; it may be called several times.
        x: Images.
        loss: From one image's output ``[1, ...]`` and its number to a scalar.
    """
    layer = model.get_submodule(name)
    blocks = []
    for number in range(len(x)):
        outputs: list[Tensor] = []
        handle = layer.register_forward_hook(partial(_keep, outputs))
        value = loss(model(x[number : number + 1].clone().requires_grad_()), number)
        handle.remove()
        blocks += [output_rows(layer, g) for g in torch.autograd.grad(value, outputs)]
    rows = torch.cat(blocks, dim=1)
    groups, _, outputs_per_group = rows.shape
    total = torch.zeros(groups, outputs_per_group, outputs_per_group, dtype=rows.dtype)
    for group in range(groups):
        for row in rows[group]:
            total[group] += torch.outer(row, row)
    return total / rows.shape[1]


def unbeaten(cost: np.ndarray, lost: np.ndarray, each: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All sums of what there is with each pair of a cost and a loss ``[n, 2]``.

    Without those that another beats in both, which cannot be part of the best.
    """
    cost = (cost[:, None] + each[:, 0]).ravel()
    lost = (lost[:, None] + each[:, 1]).ravel()
    order = np.lexsort((lost, cost))
    best = np.minimum.accumulate(lost[order])
    keep = order[np.r_[True, lost[order][1:] < best[:-1]]]
    return cost[keep], lost[keep]
