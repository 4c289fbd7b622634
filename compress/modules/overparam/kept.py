"""The collapsed weight that an over-parameterised layer keeps, and its gradient.

A kept weight must not hold an autograd graph: the first backward pass would free it, and the second
forward would share it. It is kept as a value, and `_Kept` puts that value in the graph as a
function of the sublayers' tensors, whose backward collapses the chain again. Every forward so has a
node of its own, and derivatives of any order are those of collapsing anew.

A kept weight is good as long as the tensors that it was made from are the same with the same
versions, and no optimiser has taken a step since: fused optimisers change values without raising
versions.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

Tensors = Sequence[Tensor | None]
Collapsed = tuple[Tensor, Tensor | None]
Compose = Callable[[Tensors], Collapsed]


class _Steps:
    """How many steps the optimisers of this process have taken, from the first question on."""

    taken = 0
    watched = False

    @classmethod
    def so_far(cls) -> int:
        """The count; torch is asked to report steps once there is something to watch them for."""
        if not cls.watched:
            cls.watched = True
            register_optimizer_step_post_hook(cls._one_more)
        return cls.taken

    @classmethod
    def _one_more(cls, _optimiser: Optimizer, _args: Any, _kwargs: Any) -> None:
        cls.taken += 1


@dataclass(frozen=True)
class Stamp:
    """What tells whether a tensor is the one it was, with the values it had.

    The storage is held weakly, which keeps its identity from being given to another one.
    """

    tensor: weakref.ref[Tensor]
    storage: StorageWeakRef
    address: int
    version: int

    def fits(self, tensor: Tensor) -> bool:
        """Whether nothing was replaced, moved or written in place since."""
        return (
            self.tensor() is tensor
            and self.version == tensor._version
            and self.address == tensor.data_ptr()
            and self.storage == _storage(tensor)
        )


@dataclass(frozen=True)
class KeptWeight:
    """A collapsed weight and bias without a graph, and what they were made from.

    Attributes:
        stamps: One for each tensor, None where the layer has none.
        options: Numbers that the result depends on besides the tensors.
        value: ``(weight, bias)``.
        versions: Of the value itself; an in-place edit of it makes it useless.
        constants: The tensors that need no gradient, as they were: the statistics of BatchNorm
            may be updated between a forward and its backward.
        compose: Collapses tensors under these options, in the precision for a gradient.
        steps: Optimisers' steps when it was made.
    """

    stamps: tuple[Stamp | None, ...]
    options: tuple[float, ...]
    value: Collapsed
    versions: tuple[int, ...]
    constants: dict[int, Tensor]
    compose: Compose
    steps: int

    def fits(self, tensors: Tensors, options: tuple[float, ...]) -> bool:
        """Whether collapsing ``tensors`` would give this value."""
        return (
            self.options == options
            and self.steps == _Steps.so_far()
            and self.versions == _versions(self.value)
            and len(self.stamps) == len(tensors)
            and all(map(_same, self.stamps, tensors))
        )


def keep(
    tensors: Tensors, options: tuple[float, ...], collapsed: Collapsed, compose: Compose
) -> KeptWeight:
    """Return a record of ``collapsed``, without its graph.

    Args:
        tensors: What it was made from, readable (`readable`).
        options: As in `KeptWeight`.
        collapsed: Weight and bias.
        compose: What makes them, as `KeptWeight` has it.
    """
    weight, bias = collapsed
    value = weight.detach(), None if bias is None else bias.detach()
    stamps = tuple(None if t is None else _stamp(t) for t in tensors)
    # Statistics are a few numbers a channel; frozen factors are not copied.
    constants = {
        i: t.detach().clone()
        for i, t in enumerate(tensors)
        if t is not None and t.dim() < 2 and not t.requires_grad
    }
    return KeptWeight(stamps, options, value, _versions(value), constants, compose, _Steps.so_far())


def readable(tensors: Tensors) -> bool:
    """Whether the tensors' versions and addresses can be read and mean something.

    They cannot for inference tensors (no version) and under `torch.func` transforms (no storage);
    a graph that is being recorded must hold the computation and not its result; and a derivative
    in forward mode rides on the tensors themselves.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if _transformed():
        return False
    return not any(t is not None and t.is_inference() for t in tensors)


def _transformed() -> bool:
    """Whether a `torch.func` transform or a forward-mode level is active."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def differentiable(kept: KeptWeight, tensors: Tensors) -> Collapsed:
    """Return the kept weight and bias as functions of ``tensors``, which `KeptWeight.fits`."""
    given = [
        t if t is None or t.requires_grad else kept.constants.get(i, t)
        for i, t in enumerate(tensors)
    ]
    outputs: tuple[Tensor, ...] = _Kept.apply(kept, *given)  # type: ignore[no-untyped-call]
    return outputs[0], outputs[1] if len(outputs) > 1 else None


class _Kept(torch.autograd.Function):
    """A value known beforehand, with the derivative of what it was computed by."""

    @staticmethod
    def forward(ctx: Any, kept: KeptWeight, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.compose = kept.compose
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in kept.value if t is not None)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        found: list[Tensor | None] = [None] * len(saved)
        with torch.enable_grad():
            # Aliases, so that a tensor that serves two sublayers gets each one's part and not
            # the sum twice.
            used = list(saved)
            for i in wanted:
                tensor = saved[i]
                assert tensor is not None
                used[i] = tensor.view_as(tensor)
            outputs = [t for t in ctx.compose(used) if t is not None]
            pairs = [
                (output, slope)
                for output, slope in zip(outputs, slopes, strict=True)
                if slope is not None and output.requires_grad
            ]
        if pairs:
            gradients = torch.autograd.grad(
                [o for o, _ in pairs],
                [t for i in wanted if (t := used[i]) is not None],
                [s for _, s in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
            for i, gradient in zip(wanted, gradients, strict=True):
                found[i] = gradient
        return (None, *found)


def _stamp(tensor: Tensor) -> Stamp:
    return Stamp(
        weakref.ref(tensor),
        _storage(tensor),
        tensor.data_ptr(),
        tensor._version,
    )


def _same(stamp: Stamp | None, tensor: Tensor | None) -> bool:
    if stamp is None or tensor is None:
        return stamp is None and tensor is None
    return stamp.fits(tensor)


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _versions(value: Collapsed) -> tuple[int, ...]:
    return tuple(t._version for t in value if t is not None)
