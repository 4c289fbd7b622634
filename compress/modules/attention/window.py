"""Torchvision's Swin attention with called projections."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.modules.attention.rebuild import find_obstacle, make_linear, require

# The classes are told by name, because compress.vision.pictures alone imports torchvision.
SWIN = "torchvision.models.swin_transformer"

Pair = tuple[int, int]


class UnpackedWindowAttention(nn.Module):
    """Torchvision's Swin attention, first and second version, with called projections.

    Shifted windows: Liu et al. 2021, section 3.2; cosine attention with a learned scale and a
    continuous position bias: Liu et al. 2022, section 3.2. Names of the state are torchvision's.
    The second version ignores the key's part of ``qkv.bias``; here that part is zero instead.
    """

    window_size: Pair
    shift_size: Pair
    num_heads: int
    attention_dropout: float
    dropout: float
    cosine: bool
    qkv: nn.Module
    proj: nn.Module
    cpb_mlp: nn.Module
    logit_scale: Tensor
    relative_position_bias_table: Tensor
    relative_position_index: Tensor
    relative_coords_table: Tensor

    @classmethod
    def from_module(cls, module: nn.Module) -> UnpackedWindowAttention:
        """Build the equal of torchvision's ``ShiftedWindowAttention`` or ``…V2``.

        Raises:
            UnsupportedLayer: Another type, or one that was changed so that an equal is not known.
        """
        require(module, window_obstacle(module))
        source: Any = module
        new = cls()
        for name in ("num_heads", "attention_dropout", "dropout", "qkv", "proj"):
            setattr(new, name, getattr(source, name))
        new.window_size, new.shift_size = tuple(source.window_size), tuple(source.shift_size)
        new.register_buffer("relative_position_index", source.relative_position_index)
        new.cosine = swin_name(module) == "ShiftedWindowAttentionV2"
        if not new.cosine:
            new.relative_position_bias_table = source.relative_position_bias_table
        else:
            new.register_buffer("relative_coords_table", source.relative_coords_table)
            new.logit_scale, new.cpb_mlp = source.logit_scale, source.cpb_mlp
            new.qkv = _without_key_bias(source.qkv)
        new.training = module.training
        return new

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows.

        Args:
            x: ``[N, H, W, C]``.

        Returns:
            ``[N, H, W, C]``.
        """
        windows = _windows(x, self.window_size, self.shift_size)
        attended = _attend_windows(
            self.qkv(windows),
            x,
            self._position_bias(),
            self.window_size,
            self.shift_size,
            self.logit_scale if self.cosine else None,
            self.attention_dropout if self.training else 0.0,
        )
        merged = F.dropout(self.proj(attended), self.dropout, self.training)
        return _merge_windows(merged, x, self.window_size, self.shift_size)

    def _position_bias(self) -> Tensor:
        """Return the bias of every pair of positions in a window, ``[heads, tokens, tokens]``."""
        if self.cosine:
            table: Tensor = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        else:
            table = self.relative_position_bias_table
        tokens = math.prod(self.window_size)
        bias = table[self.relative_position_index].view(tokens, tokens, -1).permute(2, 0, 1)
        return 16 * torch.sigmoid(bias) if self.cosine else bias

    def extra_repr(self) -> str:
        """Show what the children do not."""
        return f"num_heads={self.num_heads}, window={self.window_size}, shift={self.shift_size}"


def swin_name(module: nn.Module) -> str:
    """Return the class name of a torchvision Swin attention, else the empty string."""
    kind = type(module)
    known = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")
    return kind.__name__ if kind.__module__ == SWIN and kind.__name__ in known else ""


def window_obstacle(module: nn.Module) -> str | None:
    """Return why `UnpackedWindowAttention` cannot stand in for ``module``, or None."""
    if not swin_name(module):
        return "it is not exactly one of torchvision's Swin attentions"
    return find_obstacle(module, ("qkv", "proj"))


def _without_key_bias(qkv: nn.Linear) -> nn.Linear:
    """Share the weight and zero the key's third of the bias."""
    source: Tensor | None = qkv.bias
    if source is None:
        return qkv
    bias = source.detach().clone()
    bias[len(bias) // 3 : 2 * len(bias) // 3] = 0
    linear = make_linear(qkv.weight, nn.Parameter(bias, source.requires_grad))
    linear.training = qkv.training
    return linear


def _padded_grid(x: Tensor, window: Pair, shift: Pair) -> tuple[Pair, Pair]:
    """Return the side lengths that windows fill, and the shift: none along a single window."""
    height, width = (-(-side // w) * w for side, w in zip(x.shape[1:3], window, strict=True))
    down, right = (
        0 if w >= side else s for s, w, side in zip(shift, window, (height, width), strict=True)
    )
    return (height, width), (down, right)


def _split(x: Tensor, window: Pair) -> Tensor:
    """``[N, H, W, C]`` to ``[N · windows, tokens, C]``."""
    batch, height, width, channels = x.shape
    down, right = height // window[0], width // window[1]
    x = x.reshape(batch, down, window[0], right, window[1], channels).transpose(2, 3)
    return x.reshape(batch * down * right, window[0] * window[1], channels)


def _windows(x: Tensor, window: Pair, shift: Pair) -> Tensor:
    """Pad ``[N, H, W, C]`` to whole windows, shift it and split it."""
    (height, width), (down, right) = _padded_grid(x, window, shift)
    x = F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    if down or right:
        x = x.roll((-down, -right), (1, 2))
    return _split(x, window)


def _attend_windows(
    qkv: Tensor,
    x: Tensor,
    bias: Tensor,
    window: Pair,
    shift: Pair,
    logit_scale: Tensor | None,
    dropout: float,
) -> Tensor:
    """Attend within each window of ``qkv`` ``[N · windows, tokens, 3C]``; ``x`` gives the grid."""
    split = qkv.reshape(*qkv.shape[:2], 3, len(bias), -1)
    q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
    scale = None
    if logit_scale is not None:
        q = F.normalize(q, dim=-1) * logit_scale.clamp(max=math.log(100.0)).exp()
        k, scale = F.normalize(k, dim=-1), 1.0
    (height, width), (down, right) = _padded_grid(x, window, shift)
    mask = bias[None]
    if down or right:
        # After the shift a window at the far edge holds tokens from both edges of the image, which
        # must not see each other: each axis falls into three regions, as the paper's figure 4.
        rows = _regions(height, window[0], down, x.device)
        columns = _regions(width, window[1], right, x.device)
        grid = _split((3 * rows[:, None] + columns)[None, :, :, None], window)
        apart = grid != grid.transpose(1, 2)
        mask = mask + torch.zeros_like(apart, dtype=x.dtype).masked_fill_(apart, -100.0)[:, None]
        mask = mask.repeat(len(x), 1, 1, 1)
    attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    return attended.transpose(1, 2).flatten(2)


def _regions(side: int, window: int, shift: int, device: torch.device) -> Tensor:
    position = torch.arange(side, device=device)
    if not shift:
        return torch.zeros_like(position)
    return (position >= side - window).long() + (position >= side - shift).long()


def _merge_windows(merged: Tensor, x: Tensor, window: Pair, shift: Pair) -> Tensor:
    """Undo `_windows`: ``[N · windows, tokens, C]`` to the shape of ``x``."""
    (height, width), (down, right) = _padded_grid(x, window, shift)
    grid = (len(x), height // window[0], width // window[1], *window, merged.shape[-1])
    merged = merged.reshape(grid).transpose(2, 3).reshape(len(x), height, width, -1)
    if down or right:
        merged = merged.roll((down, right), (1, 2))
    return merged[:, : x.shape[1], : x.shape[2]].contiguous()


for _wrapped in ("_windows", "_attend_windows", "_merge_windows"):
    torch.fx.wrap(_wrapped)
