"""What over-parameterised layers share: the sublayers and the single layer that they equal."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from compress.linalg.kernels import BatchNorm, fold_batch_norm, wide_dtype
from compress.modules.overparam.chain import Chain, compose_chain
from compress.modules.overparam.kept import (
    Collapsed,
    KeptWeight,
    Tensors,
    differentiable,
    keep,
    readable,
)

# Tensors of a sublayer: weight, bias, and its BatchNorm's weight, bias, mean, variance and count.
# The count is not a part of the result, but a training forward moves mean and variance without
# raising their versions, and the count's alone tells.
_SLOTS = 7
InitFunction = Callable[..., Any]


class OverparamLayer(nn.Module):
    """What both kinds share: the sublayers, their initialisation and the collapsed form.

    In training the sublayers ``layers`` (and ``norms``, with ``batch_norm=True``) run one after
    the other; in evaluation the one layer that they equal does. ``weight`` and ``bias`` are that
    layer's at any time, differentiable with respect to every sublayer.

    The collapsed weight is kept, and made anew when any sublayer's tensor was replaced, moved or
    written in place, an optimiser took a step, or the mode was set. Where gradients are asked for,
    the kept weight serves every forward and its backward collapses the chain again, so that each
    backward pass, of any order, stands by itself. In evaluation, writes through ``tensor.data``, or
    through another tensor over its storage, cannot be seen: write under ``torch.no_grad()``.
    """

    chain: Chain
    layers: nn.ModuleList
    norms: nn.ModuleList
    negative_slope: float
    _kept: KeptWeight | None

    def _assemble(
        self, layers: list[nn.Module], norms: list[nn.Module], negative_slope: float
    ) -> None:
        negative_slope = float(negative_slope)  # torch's gain takes no number of numpy's
        if not math.isfinite(negative_slope):
            raise ValueError(
                f"{type(self).__name__} has negative_slope={negative_slope}; it must be finite."
            )
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(norms)
        self.negative_slope = negative_slope
        self._kept = None
        self.reset_parameters()

    def reset_parameters(
        self,
        init_fn: InitFunction = nn.init.kaiming_normal_,
        b_init: Literal["zero", "default"] = "zero",
        mode: Literal["fan_in", "fan_out"] | None = None,
    ) -> None:
        """Draw new weights, by default Kaiming normal with zero biases; BatchNorm 1 and 0.

        The gain is that of a leaky ReLU of ``negative_slope`` at the last sublayer (√2 for ReLU)
        and 1 before, where nothing nonlinear follows.

        Args:
            init_fn: Function of `torch.nn.init`, or one like them. It is called with ``a``,
                ``mode`` and ``nonlinearity`` where it takes those (Kaiming), with ``gain`` where
                it takes that (Xavier, orthogonal), with the weight alone otherwise.
            b_init: "zero", or "default": uniform within ``1 / sqrt(fan_in)``, as in torch's layers.
            mode: Fan that `init_fn` keeps the variance of; None is the outgoing one for
                convolutions and the incoming one for linear layers.

        Raises:
            ValueError: An unknown ``b_init`` or ``mode``.
        """
        if b_init not in ("zero", "default"):
            raise ValueError(f"b_init={b_init!r} is unknown; it is 'zero' or 'default'.")
        if mode not in (None, "fan_in", "fan_out"):
            raise ValueError(f"mode={mode!r} is unknown; it is 'fan_in' or 'fan_out'.")
        layer: Any
        norm: Any
        for position, layer in enumerate(self.layers):
            slope = self.negative_slope if position == len(self.layers) - 1 else 1.0
            fan = mode or ("fan_out" if isinstance(layer, nn.Conv2d) else "fan_in")
            _draw(init_fn, layer.weight, slope, fan)
            if layer.bias is not None and b_init == "zero":
                nn.init.zeros_(layer.bias)
            elif layer.bias is not None:
                bound = layer.weight[0].numel() ** -0.5
                nn.init.uniform_(layer.bias, -bound, bound)
        for norm in self.norms:
            norm.reset_parameters()

    @property
    def depth(self) -> int:
        """Number of sublayers."""
        return self.chain.depth

    @property
    def weight(self) -> Tensor:
        """Weight of the one layer that this one equals in evaluation: a new tensor each time."""
        return self.effective()[0].clone()

    @property
    def bias(self) -> Tensor | None:
        """Bias of that layer, a new tensor each time, or None."""
        bias = self.effective()[1]
        return None if bias is None else bias.clone()

    def effective(self) -> Collapsed:
        """Weight and bias of the one layer, kept from the last call where nothing changed."""
        tensors = self._tensors()
        epsilons = self._epsilons()
        compose = functools.partial(_compose, self.chain, epsilons, wide_dtype)
        tracked = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in tensors
        )
        if not readable(tensors):
            return compose(tensors)
        kept = self._kept
        if kept is None or not kept.fits(tensors, epsilons):
            # A tensor made under inference_mode could not be used in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                collapsed = compose(tensors)
            # A gradient need not be more precise than the chain's own would be.
            again = functools.partial(_compose, self.chain, epsilons, _own_dtype)
            kept = self._kept = keep(tensors, epsilons, collapsed, again)
        # The first use takes the same way as all others, which checkpoints rely on.
        return differentiable(kept, tensors) if tracked else kept.value

    def forget(self) -> None:
        """Collapse anew at the next use, whatever was written where nothing could tell."""
        self._kept = None

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and `forget`, as the authors' layers do in evaluation."""
        self.forget()
        return super().train(mode)

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

    def _epsilons(self) -> tuple[float, ...]:
        norms: list[Any] = list(self.norms)
        return tuple(float(norm.eps) for norm in norms)

    def _tensors(self) -> list[Tensor | None]:
        """`_SLOTS` tensors of each sublayer, None where it has none."""
        found: list[Tensor | None] = []
        layer: Any
        for position, layer in enumerate(self.layers):
            found += [layer.weight, layer.bias]
            norm: Any = self.norms[position] if len(self.norms) else None
            if norm is None:
                found += [None] * 5
            else:
                found += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
                found += [norm.num_batches_tracked]
        return found

    def _filled(self, plain: nn.Module) -> Any:
        self.forget()
        weight, bias = self.effective()
        trained = any(p.requires_grad for p in self.parameters())
        plain.weight = nn.Parameter(weight.detach().clone(), requires_grad=trained)
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().clone(), requires_grad=trained)
        return plain.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state.setdefault("negative_slope", 0.0)
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # untyped in torch


def _own_dtype(weight: Tensor) -> torch.dtype:
    """float32, or float64 for such a weight."""
    return torch.promote_types(weight.dtype, torch.float32)


def _compose(
    chain: Chain,
    epsilons: Sequence[float],
    precision: Callable[[Tensor], torch.dtype],
    tensors: Tensors,
) -> Collapsed:
    """Weight and bias of the one layer, from `_SLOTS` tensors of each sublayer.

    Args:
        chain: Its shape.
        epsilons: Of the BatchNorms.
        precision: What dtype to compute with a weight in.
        tensors: The sublayers'.
    """
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    last = tensors[-_SLOTS]
    assert last is not None
    for position in range(chain.depth):
        weight, bias, gamma, beta, mean, variance, _ = tensors[position * _SLOTS :][:_SLOTS]
        assert weight is not None
        weight = weight.to(precision(weight))
        if epsilons:
            assert mean is not None
            assert variance is not None
            norm = BatchNorm(mean, variance, gamma, beta, epsilons[position])
            weight, bias = fold_batch_norm(weight, bias, norm)
        weights.append(weight if weight.dim() == 4 else weight[:, :, None, None])
        biases.append(bias)
    weight, bias = compose_chain(chain, weights, biases)
    if last.dim() == 2:
        weight = weight[:, :, 0, 0]
    return weight.to(last.dtype).contiguous(), None if bias is None else bias.to(last.dtype)


def _draw(init_fn: InitFunction, weight: Tensor, slope: float, mode: str) -> None:
    """Fill ``weight`` by ``init_fn``, for a leaky ReLU of ``slope`` after it (1: none)."""
    try:
        takes = set(inspect.signature(init_fn).parameters)
    except ValueError:  # a builtin has no signature to read
        takes = set()
    if {"a", "mode", "nonlinearity"} <= takes:
        init_fn(weight, a=slope, mode=mode, nonlinearity="leaky_relu")
    elif "gain" in takes:
        init_fn(weight, gain=nn.init.calculate_gain("leaky_relu", slope))
    else:
        init_fn(weight)
