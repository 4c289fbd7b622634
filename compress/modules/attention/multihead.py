"""`nn.MultiheadAttention` with called projections."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.modules.attention.rebuild import find_obstacle, make_linear, require


class UnpackedAttention(nn.Module):
    """`nn.MultiheadAttention` with called projections (Vaswani et al. 2017, section 3.2.2).

    Self-attention projects with one ``in_proj`` ``[3E, E]``, applied once, so that query, key and
    value share the rank of a factorised projection. Where query, key and value are different
    tensors, the whole of ``in_proj`` is applied to each and the part that is needed is kept: right,
    but up to three times the work. For modules that are known to attend to another sequence, and
    for ``kdim`` or ``vdim`` of their own, there are three layers ``q_proj``, ``k_proj``, ``v_proj``
    instead and no work is lost.

    Arguments, shapes and results of `forward` are those of `nn.MultiheadAttention`, except that
    boolean and floating masks may be mixed.
    """

    embed_dim: int
    kdim: int
    vdim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    packed: bool
    in_proj: nn.Module
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    @classmethod
    def from_module(cls, module: nn.Module, packed: bool = True) -> UnpackedAttention:
        """Build the equal of an `nn.MultiheadAttention`, sharing its parameters.

        Args:
            module: Exactly an `nn.MultiheadAttention`; it is left as it was.
            packed: Use one ``in_proj`` where query, key and value have the same width.

        Raises:
            UnsupportedLayer: Another type, or one that was changed so that an equal is not known.
        """
        require(module, attention_obstacle(module))
        assert isinstance(module, nn.MultiheadAttention)
        new = cls()
        for name in (
            "embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first",
            "add_zero_attn", "bias_k", "bias_v",
        ):  # fmt: skip
            setattr(new, name, getattr(module, name))
        weight, bias = module.in_proj_weight, module.in_proj_bias
        new.packed = packed and weight is not None
        if new.packed:
            new.in_proj = make_linear(weight, bias)
        else:
            weights = (
                (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
                if weight is None
                else weight.chunk(3)
            )
            biases = (None, None, None) if bias is None else bias.chunk(3)
            new.q_proj, new.k_proj, new.v_proj = map(make_linear, weights, biases)
        new.out_proj = make_linear(module.out_proj.weight, module.out_proj.bias)
        new.train(module.training)
        new.out_proj.training = module.out_proj.training
        return new

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see `nn.MultiheadAttention.forward`.

        Returns:
            The output, shaped as ``query``, and the attention weights or None.
        """
        attended = _attend(
            *self._project(query, key, value),
            packed=self.packed,
            num_heads=self.num_heads,
            batch_first=self.batch_first,
            bias_k=self.bias_k,
            bias_v=self.bias_v,
            add_zero_attn=self.add_zero_attn,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            dropout=self.dropout if self.training else 0.0,
            need_weights=need_weights,
            average=average_attn_weights,
        )
        return self.out_proj(attended[0]), attended[1]

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three projections, each of all of ``in_proj`` where that is packed."""
        if not self.packed:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        for_query = self.in_proj(query)
        for_key = for_query if key is query else self.in_proj(key)
        for_value = for_key if value is key else self.in_proj(value)
        return for_query, for_key, for_value

    def extra_repr(self) -> str:
        """Show what the children do not."""
        return f"num_heads={self.num_heads}, batch_first={self.batch_first}"


def attention_obstacle(module: nn.Module) -> str | None:
    """Return why `UnpackedAttention` cannot stand in for ``module``, or None."""
    if type(module) is not nn.MultiheadAttention:
        return "it is not exactly an nn.MultiheadAttention"
    return find_obstacle(module, ("out_proj",))


def _check_attended(*projected: Tensor) -> None:
    if any(tensor.is_nested for tensor in projected):
        raise ValueError("unpacked attention does not take nested tensors; pass a padding mask")


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    packed: bool,
    num_heads: int,
    batch_first: bool,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    dropout: float,
    need_weights: bool,
    average: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend with projections in the layout of `nn.MultiheadAttention`, parts of packed ones."""
    _check_attended(q, k, v)
    if is_causal and attn_mask is None:
        raise ValueError("is_causal is a hint about attn_mask, which is missing; pass the mask")
    if packed:
        width = q.shape[-1] // 3
        q, k, v = q[..., :width], k[..., width : 2 * width], v[..., 2 * width :]
    if is_causal and key_padding_mask is None and not need_weights:
        attn_mask = None  # the hint stands for the mask, and the kernel needs only one
    else:
        is_causal = False
    batched = q.dim() == 3
    if not batched:
        q, k, v = q[None], k[None], v[None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    elif not batch_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(len(k), 1, -1)], dim=1)
        v = torch.cat([v, bias_v.expand(len(v), 1, -1)], dim=1)
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    q, k, v = (t.reshape(*t.shape[:2], num_heads, -1).transpose(1, 2) for t in (q, k, v))
    mask = _merge_masks(attn_mask, key_padding_mask, q, k.shape[2])
    weights = None
    if need_weights:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores if mask is None else scores + mask
        weights = F.dropout(scores.softmax(-1), dropout)
        context = weights @ v
        weights = weights.mean(1) if average else weights
        weights = weights if batched else weights[0]
    else:
        context = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
    context = context.transpose(1, 2).flatten(2)
    if not batched:
        return context[0], weights
    return context if batch_first else context.transpose(0, 1), weights


def _merge_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, keys: int
) -> Tensor | None:
    """Return what is added to the scores ``[N, heads, L, keys]``; keys past a mask are seen."""
    merged = None
    for mask, per_key in ((attn_mask, False), (key_padding_mask, True)):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -math.inf)
        elif not mask.is_floating_point():
            raise ValueError(f"a mask is boolean or floating, not {mask.dtype}")
        mask = F.pad(mask, (0, keys - mask.shape[-1]))
        if per_key:
            mask = mask[:, None, None, :]
        elif mask.dim() == 3:
            mask = mask.view(len(q), -1, *mask.shape[1:])
        merged = mask if merged is None else merged + mask
    return merged


torch.fx.wrap("_attend")
