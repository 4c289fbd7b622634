"""`nn.TransformerEncoder` and its layer without the paths that read their children's weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.modules.attention.multihead import UnpackedAttention, attention_obstacle
from compress.modules.attention.rebuild import find_obstacle, require


class UnpackedEncoderLayer(nn.Module):
    """`nn.TransformerEncoderLayer` without the fused path that reads its children's weights.

    Floating masks are added to the scores, as documented. Torch's fused path gets that wrong: it
    hides whatever a floating mask does not leave at zero.
    """

    norm_first: bool
    self_attn: nn.Module
    linear1: nn.Module
    linear2: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    dropout: nn.Module
    dropout1: nn.Module
    dropout2: nn.Module
    activation: Callable[[Tensor], Tensor]

    @classmethod
    def from_module(cls, module: nn.Module) -> UnpackedEncoderLayer:
        """Build the equal of an `nn.TransformerEncoderLayer`, sharing its children.

        Raises:
            UnsupportedLayer: Another type, or one that was changed so that an equal is not known.
        """
        require(module, encoder_layer_obstacle(module))
        new = cls()
        for name in (
            "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2",
            "activation", "norm_first",
        ):  # fmt: skip
            setattr(new, name, getattr(module, name))
        new.self_attn = UnpackedAttention.from_module(module.get_submodule("self_attn"))
        new.training = module.training
        return new

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Encode; see `nn.TransformerEncoderLayer.forward`."""
        masks = {
            "attn_mask": src_mask,
            "key_padding_mask": src_key_padding_mask,
            "is_causal": is_causal,
        }
        if self.norm_first:
            src = src + self._attend(self.norm1(src), masks)
            return src + self._feed(self.norm2(src))
        src = self.norm1(src + self._attend(src, masks))
        output: Tensor = self.norm2(src + self._feed(src))
        return output

    def _attend(self, x: Tensor, masks: dict[str, Any]) -> Tensor:
        attended = self.self_attn(x, x, x, need_weights=False, **masks)[0]
        dropped: Tensor = self.dropout1(attended)
        return dropped

    def _feed(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.activation(self.linear1(x)))
        dropped: Tensor = self.dropout2(self.linear2(hidden))
        return dropped


class UnpackedEncoder(nn.Module):
    """`nn.TransformerEncoder` without nested tensors.

    Where torch would have packed a padded batch into a nested tensor, which makes zeros of the
    padded positions before the final norm, this makes the same zeros. A floating padding mask
    counts as padding where it is minus infinity.
    """

    layers: nn.ModuleList
    num_layers: int
    norm: nn.Module | None
    mask_check: bool

    @classmethod
    def from_module(cls, module: nn.Module) -> UnpackedEncoder:
        """Build the equal of an `nn.TransformerEncoder`, its layers unpacked as well.

        Raises:
            UnsupportedLayer: Another type, or one whose layers have no known equal.
        """
        require(module, encoder_obstacle(module))
        assert isinstance(module, nn.TransformerEncoder)
        new = cls()
        made: dict[nn.Module, nn.Module] = {}
        for layer in module.layers:
            if layer not in made:
                made[layer] = UnpackedEncoderLayer.from_module(layer)
        new.layers = nn.ModuleList([made[layer] for layer in module.layers])
        new.num_layers, new.norm = module.num_layers, module.norm
        new.mask_check = getattr(module, "mask_check", True)
        new.training = module.training
        return new

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Encode; see `nn.TransformerEncoder.forward`."""
        output = src
        for layer in self.layers:
            output = layer(
                output,
                src_mask=mask,
                src_key_padding_mask=src_key_padding_mask,
                is_causal=is_causal is True,
            )
        if mask is None and src_key_padding_mask is not None and not self.layers[0].training:
            trained = any(p.requires_grad for p in self.layers[0].parameters())
            output = _zero_padding(output, src, src_key_padding_mask, trained, self.mask_check)
        return output if self.norm is None else self.norm(output)


def encoder_layer_obstacle(module: nn.Module) -> str | None:
    """Return why `UnpackedEncoderLayer` cannot stand in for ``module``, or None."""
    if type(module) is not nn.TransformerEncoderLayer:
        return "it is not exactly an nn.TransformerEncoderLayer"
    return attention_obstacle(module.self_attn) or find_obstacle(module)


def encoder_obstacle(module: nn.Module) -> str | None:
    """Return why `UnpackedEncoder` cannot stand in for ``module``, or None."""
    if type(module) is not nn.TransformerEncoder:
        return "it is not exactly an nn.TransformerEncoder"
    found = [encoder_layer_obstacle(layer) for layer in module.layers]
    return next(filter(None, found), None) or find_obstacle(module)


def _zero_padding(
    output: Tensor, src: Tensor, padding: Tensor, trained: bool, mask_check: bool
) -> Tensor:
    """Zero the padded positions where `nn.TransformerEncoder` would use a nested tensor."""
    padded = padding if padding.dtype == torch.bool else padding == -math.inf
    if (
        not torch.backends.mha.get_fastpath_enabled()
        or src.dim() != 3
        or torch.is_autocast_enabled()
        or (torch.is_grad_enabled() and (trained or src.requires_grad))
        or (mask_check and bool((padded[:, :-1] & ~padded[:, 1:]).any()))
    ):
        return output
    return output.masked_fill(padded[..., None], 0.0)


torch.fx.wrap("_zero_padding")
