"""What over-parameterised layers share: the sublayers and the single layer that they equal."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from compress.linalg.kernels import BatchNorm, fold_batch_norm, wide_dtype
from compress.modules.overparam.chain import Chain, compose_chain


class OverparamLayer(nn.Module):
    """What both kinds share: the sublayers, their initialisation and the collapsed form.

    In training the sublayers ``layers`` (and ``norms``, with ``batch_norm=True``) run one after
    the other; in evaluation the one layer that they equal does. ``weight`` and ``bias`` are that
    layer's at any time, differentiable with respect to every sublayer.

    The collapsed weight is kept while no gradient is asked for, and made anew when any sublayer's
    tensor was replaced, moved or written in place. Writes through ``tensor.data``, or
    through another tensor over its storage, cannot be seen: write under ``torch.no_grad()``.
    """

    chain: Chain
    layers: nn.ModuleList
    norms: nn.ModuleList
    _kept: (
        tuple[list[tuple[weakref.ref[Tensor], int, int]], list[float], Tensor, Tensor | None] | None
    )

    def _assemble(self, layers: list[nn.Module], norms: list[nn.Module]) -> None:
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(norms)
        self._kept = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights: Kaiming normal, gain √2 at the last sublayer and 1 before; BN 1 and 0.

        The fan is the outgoing one for convolutions and the incoming one for linear layers; biases
        are zero.
        """
        layer: Any
        norm: Any
        for position, layer in enumerate(self.layers):
            last = position == len(self.layers) - 1
            nn.init.kaiming_normal_(
                layer.weight,
                mode="fan_out" if isinstance(layer, nn.Conv2d) else "fan_in",
                nonlinearity="relu" if last else "linear",
            )
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for norm in self.norms:
            norm.reset_parameters()

    @property
    def depth(self) -> int:
        """Number of sublayers."""
        return self.chain.depth

    @property
    def weight(self) -> Tensor:
        """Weight of the one layer that this one equals in evaluation."""
        return self.effective()[0]

    @property
    def bias(self) -> Tensor | None:
        """Bias of that layer, or None."""
        return self.effective()[1]

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the one layer, kept from the last call where nothing changed."""
        tensors = self._tensors()
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        stamps = None if tracked else _stamps(tensors)
        if stamps is None:
            return self._compose()
        norms: list[Any] = list(self.norms)
        eps = [float(norm.eps) for norm in norms]
        kept = self._kept
        if kept is not None and kept[1] == eps and _same(kept[0], tensors, stamps):
            return kept[2], kept[3]
        # A tensor made under inference_mode could not be used in a later training step.
        with torch.inference_mode(False), torch.no_grad():
            weight, bias = self._compose()
        references = [
            (weakref.ref(t), version, pointer)
            for t, (version, pointer) in zip(tensors, stamps, strict=True)
        ]
        self._kept = (references, eps, weight, bias)
        return weight, bias

    @contextlib.contextmanager
    def _statistics_kept_on_error(self) -> Iterator[None]:
        """Undo BatchNorm updates where a later sublayer fails."""
        if not self.training or torch.compiler.is_compiling():
            yield
            return
        held = [(b, b.clone()) for b in self.norms.buffers()]
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for buffer, before in held:
                    buffer.copy_(before)
            raise

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor | None] = []
        layer: Any
        norm: Any
        for layer in self.layers:
            found += [layer.weight, layer.bias]
        for norm in self.norms:
            found += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        return [t for t in found if t is not None]

    def _compose(self) -> tuple[Tensor, Tensor | None]:
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        layer: Any
        for position, layer in enumerate(self.layers):
            weight = layer.weight.to(wide_dtype(layer.weight))
            bias = layer.bias
            if len(self.norms):
                norm: Any = self.norms[position]
                folded = BatchNorm(
                    norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
                )
                weight, bias = fold_batch_norm(weight, bias, folded)
            weights.append(weight if weight.dim() == 4 else weight[:, :, None, None])
            biases.append(bias)
        weight, bias = compose_chain(self.chain, weights, biases)
        dtype = layer.weight.dtype
        if layer.weight.dim() == 2:
            weight = weight[:, :, 0, 0]
        return weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype)

    def _filled(self, plain: nn.Module) -> Any:
        weight, bias = self.effective()
        trained = any(p.requires_grad for p in self.parameters())
        plain.weight = nn.Parameter(weight.detach().clone(), requires_grad=trained)
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().clone(), requires_grad=trained)
        return plain.train(self.training)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def _stamps(tensors: list[Tensor]) -> list[tuple[int, int]] | None:
    """Version and address of each tensor, or None where they cannot be read.

    They cannot for inference tensors (no version), under `torch.func` transforms (no storage) and
    while a graph is recorded, which must hold the computation and not its result.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return None
    try:
        return [(t._version, t.data_ptr()) for t in tensors]
    except RuntimeError:
        return None


def _same(
    kept: list[tuple[weakref.ref[Tensor], int, int]],
    tensors: list[Tensor],
    stamps: list[tuple[int, int]],
) -> bool:
    return len(kept) == len(tensors) and all(
        reference() is tensor and version == stamp[0] and pointer == stamp[1]
        for (reference, version, pointer), tensor, stamp in zip(kept, tensors, stamps, strict=True)
    )
