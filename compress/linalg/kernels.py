"""Kernels as tensors: composing them, folding BatchNorm into them.

Everything is computed in float64 (the caller's dtype comes back where one is named), is
differentiable and works under `torch.func`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import UnsupportedLayer

Pair = tuple[int, int]


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype for exact arithmetic on ``tensor``: float64, float32 where MPS has none."""
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64
    return torch.promote_types(tensor.dtype, wide) if tensor.is_complex() else wide


def compose_kernels(
    first: Tensor,
    second: Tensor,
    *,
    groups: int = 1,
    steps1: Pair = (1, 1),
    steps2: Pair = (1, 1),
) -> Tensor:
    """Kernel of ``second`` applied after ``first``, ``K[t] = sum over i + j = t of W2[j] W1[i]``.

    Args:
        first: ``[hidden, c_in / groups, k1_h, k1_w]``.
        second: ``[c_out, hidden / groups, k2_h, k2_w]``, same dtype and device.
        groups: Groups of both; the channel matrices are block-diagonal.
        steps1: Spacing of the first kernel's taps on the result's grid.
        steps2: Spacing of the second kernel's taps on it.

    Returns:
        ``[c_out, c_in / groups, K_h, K_w]`` with
        ``K = (k1 - 1) steps1 + (k2 - 1) steps2 + 1`` along each axis.
    """
    first, second = spread(first, steps1), spread(second, steps2)
    hidden, c_in = first.shape[0] // groups, first.shape[1]
    c_out = second.shape[0] // groups
    size1, size2 = spatial_size(first), spatial_size(second)
    if size2 == (1, 1):
        left = second.reshape(groups, c_out, hidden)
        right = first.reshape(groups, hidden, c_in * size1[0] * size1[1])
        return (left @ right).reshape(groups * c_out, c_in, *size1)
    if size1 == (1, 1):
        left = second.reshape(groups, c_out, hidden, -1).transpose(2, 3).flatten(1, 2)
        product = left @ first.reshape(groups, hidden, c_in)
        taps = product.reshape(groups * c_out, size2[0] * size2[1], c_in).transpose(1, 2)
        return taps.reshape(groups * c_out, c_in, *size2)
    # A full convolution of the first kernel's taps with the second's, its input channels as batch.
    batch = first.reshape(groups, hidden, c_in, *size1).permute(2, 0, 1, 3, 4).flatten(1, 2)
    full = (size2[0] - 1, size2[1] - 1)
    kernel = F.conv2d(batch, second.flip(-1, -2), padding=full, groups=groups)
    return kernel.transpose(0, 1)


def spread(kernel: Tensor, steps: Pair) -> Tensor:
    """Put zeros between the taps: ``[.., k]`` to ``[.., (k - 1) steps + 1]`` along both axes."""
    *lead, height, width = kernel.shape
    # The spacing of a single tap means nothing, and may be 0 where the taps of another kernel set
    # the grid.
    steps = (steps[0] if height > 1 else 1, steps[1] if width > 1 else 1)
    if steps == (1, 1):
        return kernel
    apart = F.pad(
        kernel.reshape(*lead, height, 1, width, 1), (0, steps[1] - 1, 0, 0, 0, steps[0] - 1)
    )
    apart = apart.reshape(*lead, height * steps[0], width * steps[1])
    return apart[..., : (height - 1) * steps[0] + 1, : (width - 1) * steps[1] + 1]


def regroup(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """Write the weight of a grouped convolution with fewer groups, as larger diagonal blocks.

    Args:
        weight: ``[c_out, c_in / groups, ...]``.
        groups: Its groups.
        fewer: A divisor of ``groups``.

    Returns:
        ``[c_out, c_in / fewer, ...]``, zero off the blocks.
    """
    blocks = groups // fewer
    if blocks == 1:
        return weight
    c_out, c_in, *taps = weight.shape
    split = weight.reshape(fewer, blocks, c_out // groups, 1, c_in, *taps)
    eye = torch.eye(blocks, dtype=weight.dtype, device=weight.device)
    mask = eye.reshape(1, blocks, 1, blocks, 1, *[1] * len(taps))
    return (split * mask).reshape(c_out, blocks * c_in, *taps)


def push_bias(
    first: Tensor | None, weight: Tensor, second: Tensor | None, *, groups: int = 1
) -> Tensor | None:
    """Bias of a layer after a biased one: ``b2 + sum over taps of W2 b1``, or None without any.

    Exact where the second layer pads nothing that the first one's bias was not added to.

    Args:
        first: Bias ``[hidden]`` of the first layer.
        weight: Second layer's ``[c_out, hidden / groups, ...]``.
        second: Its bias ``[c_out]``.
        groups: Its groups.

    Returns:
        ``[c_out]`` in the dtype of `wide_dtype`.
    """
    wide = wide_dtype(weight)
    if first is None:
        return None if second is None else second.to(wide)
    matrix = weight.to(wide).flatten(2).sum(-1) if weight.dim() > 2 else weight.to(wide)
    blocks = matrix.reshape(groups, -1, matrix.shape[1])
    pushed = (blocks @ first.to(wide).reshape(groups, -1, 1)).reshape(-1)
    return pushed if second is None else pushed + second.to(wide)


@dataclass(frozen=True)
class BatchNorm:
    """The evaluation form of a BatchNorm, one entry an output channel of the layer before it.

    Attributes:
        mean: Running mean ``[c_out]``.
        variance: Running variance ``[c_out]``.
        gamma: Its weight ``[c_out]``, or None for one.
        beta: Its bias ``[c_out]``, or None for zero.
        eps: Its own ``eps``.
    """

    mean: Tensor
    variance: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    norm: BatchNorm,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Fold the evaluation form of a BatchNorm into the layer before it.

    ``W' = s W``, ``b' = s (b - mean) + beta`` with ``s = gamma / sqrt(var + eps)``.

    Args:
        weight: Linear or convolution ``[c_out, c_in / groups, ...]``; a transposed convolution's
            ``[c_in, c_out / groups, ...]``.
        bias: ``[c_out]``, or None for zero.
        norm: The BatchNorm's statistics and parameters.
        transposed: Whether ``weight`` is a transposed convolution's.
        groups: Groups of the layer; only transposed convolutions need it.

    Returns:
        Weight and bias, computed in float64 and cast back to the dtype of ``weight``.

    Raises:
        UnsupportedLayer: The statistics do not have one entry an output channel.
    """
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    if norm.variance.shape != (channels,):
        raise UnsupportedLayer(
            f"A BatchNorm of {tuple(norm.variance.shape)} channels cannot be folded into a layer "
            f"with {channels} output channels; they do not follow each other."
        )
    wide = wide_dtype(weight)
    scale = (norm.variance.to(wide) + norm.eps).rsqrt()
    if norm.gamma is not None:
        scale = scale * norm.gamma.to(wide)
    if transposed:
        blocks = weight.to(wide).reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        folded = (blocks * scale.reshape(groups, 1, -1, 1)).reshape(weight.shape)
    else:
        folded = weight.to(wide) * scale.reshape(-1, *[1] * (weight.dim() - 1))
    mean = norm.mean.to(wide)
    shift = -mean if bias is None else bias.to(wide) - mean
    shift = shift * scale
    if norm.beta is not None:
        shift = shift + norm.beta.to(wide)
    return folded.to(weight.dtype), shift.to(weight.dtype)


def spatial_size(weight: Tensor) -> Pair:
    """Return ``(k_h, k_w)`` of a convolution's weight."""
    return weight.shape[2], weight.shape[3]
