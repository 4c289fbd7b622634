"""Weights for a chain such that it computes what a given layer does."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import UnsupportedLayer
from compress.linalg.kernels import Pair, spatial_size, wide_dtype
from compress.modules.overparam.chain import Chain


def split_weight(name: str, weight: Tensor, chain: Chain) -> list[Tensor]:
    """Return weights of the sublayers whose chain, residual branches included, is ``weight``.

    Without branches inside the chain, the weight is taken apart by singular value decompositions
    from the input on (a tensor train: Oseledets, "Tensor-Train Decomposition", 2011), the singular
    values shared out evenly. Hidden channels beyond the rank get random incoming and zero
    outgoing weights: they change nothing at first and can learn.

    Args:
        name: The layer, for messages.
        weight: ``[out, in / groups, k_h, k_w]``.
        chain: The chain to fill, with this layer's channels, groups and kernel.

    Returns:
        ``[channels[m], channels[m - 1] / groups, k_h, k_w]`` for each sublayer, float64.

    Raises:
        UnsupportedLayer: The chain cannot hold the weight: another kernel size, two sublayers that
            share an axis, or a rank above the hidden size.
    """
    check_kernel(name, spatial_size(weight), chain)
    holders = tuple(_holder(name, chain, axis) for axis in (0, 1))
    target = weight.to(wide_dtype(weight))
    if not chain.intervals:
        return _train(name, target, chain, holders, weight.dtype)
    if chain.intervals == (chain.depth,):
        unit = chain.identity(chain.kernel_size, target)
        return _train(name, target - unit, chain, holders, weight.dtype)
    return _around_branches(name, target, chain)


def check_kernel(name: str, size: Pair, chain: Chain) -> None:
    """Raise `UnsupportedLayer` unless the chain's kernel is the layer's."""
    if chain.kernel_size != size:
        raise UnsupportedLayer(
            f"{name} has a kernel of {_by(size)} and the chain {_list(chain)} one of "
            f"{_by(chain.kernel_size)}; give kernel_sizes that add up to the layer's, or exclude "
            "it."
        )


def _holder(name: str, chain: Chain, axis: int) -> int:
    """Index of the one sublayer whose kernel spans an axis (the first where none does)."""
    wide = [i for i, kernel in enumerate(chain.kernels) if kernel[axis] > 1]
    if len(wide) > 1:
        raise UnsupportedLayer(
            f"{name} has a kernel of {_by(chain.kernel_size)}, which the chain {_list(chain)} "
            f"cannot hold in general: its sublayers {wide} all span the "
            f"{('height', 'width')[axis]}. Give a chain with one such kernel, or init='fresh'."
        )
    return wide[0] if wide else 0


def _train(
    name: str, target: Tensor, chain: Chain, holders: tuple[int, ...], precision: torch.dtype
) -> list[Tensor]:
    groups, (k_h, k_w) = chain.groups, spatial_size(target)
    blocks = target.reshape(groups, -1, target.shape[1], k_h, k_w)
    out = blocks.shape[1]
    # [groups, in, taps in the order of the sublayers that hold them, out]
    order = (0, 2, 3, 4, 1) if holders[0] <= holders[1] else (0, 2, 4, 3, 1)
    rest = blocks.permute(order).reshape(groups, -1, out)
    incoming = target.shape[1]
    weights = []
    for position in range(chain.depth):
        taps_h = k_h if holders[0] == position else 1
        taps_w = k_w if holders[1] == position else 1
        matrix = rest.reshape(groups, incoming * taps_h * taps_w, -1)
        if position == chain.depth - 1:
            factor = matrix.transpose(1, 2)
        else:
            hidden = chain.channels[position + 1] // groups
            share = 1 / (chain.depth - position)
            factor, rest = _split(name, matrix, hidden, share, chain, precision)
        weights.append(factor.reshape(-1, incoming, taps_h, taps_w))
        incoming = factor.shape[1]
    return weights


def _split(
    name: str, matrix: Tensor, hidden: int, share: float, chain: Chain, precision: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Take ``[g, rows, columns]`` apart: ``factor^T rest``, ``[g, hidden, rows or columns]``."""
    groups, rows, columns = matrix.shape
    if hidden >= min(rows, columns):
        known_factor, known_rest = _split_full(matrix, share)
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        noise = s[:, :1] * max(rows, columns) * torch.finfo(precision).eps
        rank = int((s > noise).sum(1).max())
        if rank > hidden:
            raise UnsupportedLayer(
                f"{name} has rank {rank} where the chain {_list(chain)} has {hidden} hidden "
                f"channels{' a group' if groups > 1 else ''}, so it cannot hold it; use a larger "
                "width, or init='fresh'."
            )
        s, u, vh = s[:, :hidden], u[:, :, :hidden], vh[:, :hidden]
        known_factor = (u * s.pow(share).unsqueeze(1)).transpose(1, 2)
        known_rest = s.pow(1 - share).unsqueeze(2) * vh
    known = known_factor.shape[1]
    factor = matrix.new_empty(groups, hidden, rows).normal_(std=rows**-0.5)
    rest = matrix.new_zeros(groups, hidden, columns)
    factor[:, :known], rest[:, :known] = known_factor, known_rest
    return factor, rest


def _split_full(matrix: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The same for a matrix whose smaller side fits, by the smaller Gram matrix's eigenvectors.

    The product is exact however inaccurate the small eigenvalues are, since they cancel; they only
    share the scale out. It costs a fraction of the singular value decomposition.
    """
    tall = matrix.shape[1] >= matrix.shape[2]
    gram = matrix.transpose(1, 2) @ matrix if tall else matrix @ matrix.transpose(1, 2)
    values, vectors = torch.linalg.eigh(gram)
    largest = values[:, -1:].clamp(min=0).sqrt()
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    s = torch.maximum(values.clamp(min=0).sqrt(), 1e-6 * largest).unsqueeze(2)
    vectors = vectors.transpose(1, 2)
    if tall:
        return s.pow(share - 1) * (vectors @ matrix.transpose(1, 2)), s.pow(1 - share) * vectors
    return s.pow(share) * vectors, s.pow(-share) * (vectors @ matrix)


def _around_branches(name: str, target: Tensor, chain: Chain) -> list[Tensor]:
    """Multiples of the identity everywhere but in the sublayer with the kernel, solved for.

    Every node is then ``T_m = a_m V + b_m D`` with V the kernel looked for and D the centred
    identity, so that ``V = (W - b D) / a`` for the last node's a and b.
    """
    spatial = [i for i, k in enumerate(chain.kernels) if k != (1, 1)]
    if len(spatial) > 1:
        raise UnsupportedLayer(
            f"{name} cannot be held by the chain {_list(chain)} with residual branches inside it: "
            f"its sublayers {spatial} both have kernels. Give one kernel, or residual_intervals=-1."
        )
    holder = (spatial[0] if spatial else 0) + 1
    scales = [0.5 if chain.sources(m) else 1.0 for m in range(1, chain.depth + 1)]
    a, b = [0.0], [1.0]
    for node in range(1, chain.depth + 1):
        scale = scales[node - 1]
        a.append(b[-1] if node == holder else scale * a[-1])
        b.append(0.0 if node == holder else scale * b[-1])
        for source in chain.sources(node):
            a[-1] += a[source]
            b[-1] += b[source]

    weights = []
    for node in range(1, chain.depth + 1):
        if node == holder:
            known = b[-1] * chain.identity(spatial_size(target), target) if b[-1] else 0
            weights.append((target - known) / a[-1])
        else:
            weights.append(chain.identity((1, 1), target) * scales[node - 1])
    return weights


def _by(size: Pair) -> str:
    return f"{size[0]}x{size[1]}"


def _list(chain: Chain) -> str:
    return "[" + ", ".join(_by(k) for k in chain.kernels) + "]"
