"""One gradient for the vector and for the module's parameters.

The vector and the module share their values, but to autograd they are different leaves: a backward
pass through one would leave the other's ``grad`` empty, and an optimiser over the other would do
nothing and say nothing. Here the parameters' ``grad`` are views of the vector's, whichever of them
a backward pass reaches and whichever of them is cleared.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle, unserializable_hook

# Backward passes of several threads may reach the same leaves.
_LOCK = threading.RLock()


class SharedGradient:
    """Keeps the gradients of a vector and of the parameters that are parts of it the same.

    Args:
        vector: A leaf ``[n]``.
        pieces: ``(parameter, offset)`` of each part of it that learns.
    """

    def __init__(self, vector: nn.Parameter, pieces: Sequence[tuple[nn.Parameter, int]]) -> None:
        self._vector = vector
        self._pieces = tuple(pieces)
        # Of each piece the shape, and the strides that it has within the vector.
        self._layouts = [(p.shape, _strides(p.shape)) for p, _ in self._pieces]
        # The gradient that is shared, and each parameter's view of it; None where it has none.
        self._whole: Tensor | None = None
        self._views: list[Tensor | None] = [None] * len(self._pieces)
        self._handles: list[RemovableHandle] = []
        # The backward pass for which all parameters were looked at last.
        self._pass = -1
        with _LOCK:
            if vector.grad is not None:
                self._share(vector.grad)
            else:
                for index, (parameter, _) in enumerate(self._pieces):
                    if parameter.grad is not None:
                        self._take(index)
        self._watch()

    def release(self) -> None:
        """Stop, leaving the gradients as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clear(self) -> None:
        """Set every gradient to None."""
        with _LOCK:
            self._vector.grad = None
            for parameter, _ in self._pieces:
                parameter.grad = None
            self._share(None)

    def zero(self) -> None:
        """Fill every gradient that there is with zeros."""
        with _LOCK:
            for gradient in (self._vector.grad, *(p.grad for p, _ in self._pieces)):
                if gradient is not None:
                    gradient.detach_() if gradient.grad_fn else gradient.requires_grad_(False)
                    gradient.zero_()
            if self._vector.grad is not None:
                self._share(self._vector.grad)

    def _watch(self) -> None:
        # The hooks must not keep this object alive: the module may outlive its vector.
        this = weakref.ref(self)

        def before(index: int | None) -> Callable[[Tensor], None]:
            def hook(_: Tensor) -> None:
                if (shared := this()) is not None:
                    shared._settle(index)

            return hook

        def after(index: int | None) -> Callable[[Tensor], None]:
            def hook(_: Tensor) -> None:
                if (shared := this()) is not None:
                    shared._spread(index)

            return hook

        leaves: list[tuple[int | None, nn.Parameter]] = [(None, self._vector)]
        leaves += [(i, parameter) for i, (parameter, _) in enumerate(self._pieces)]
        for index, leaf in leaves:
            if leaf.requires_grad:
                # Untyped in torch; unserialisable, so that pickling the module does not warn.
                hook: Any = unserializable_hook(before(index))
                self._handles += [
                    leaf.register_hook(hook),
                    leaf.register_post_accumulate_grad_hook(after(index)),
                ]

    def _settle(self, index: int | None) -> None:
        """Before a leaf accumulates: follow whichever side was cleared or set since the last time.

        Args:
            index: The parameter, or None for the vector.
        """
        with _LOCK:
            if self._vector.grad is not self._whole:
                # Where the vector itself accumulates, what comes of it is shared afterwards.
                if index is not None:
                    self._share(self._vector.grad)
                return
            if self._whole is None:
                return
            # Looking at all of them for each of them would cost the square of their number, so it
            # is done for the first that a backward pass reaches.
            this = torch._C._current_graph_task_id()
            known, self._pass = this == self._pass, this
            if index is not None and known and self._as_shared(index):
                return
            tied = [i for i, view in enumerate(self._views) if view is not None]
            changed = [i for i in tied if not self._as_shared(i)]
            if tied and all(self._pieces[i][0].grad is None for i in tied):
                self._vector.grad = None
                self._share(None)
                return
            for i in changed:
                if self._pieces[i][0].grad is None:
                    with torch.no_grad():
                        self._part(i).zero_()
                    self._views[i] = None
                else:
                    self._take(i)

    def _spread(self, index: int | None) -> None:
        """After a leaf has accumulated: let the other side see it."""
        with _LOCK:
            if index is not None:
                if self._views[index] is None or not self._as_shared(index):
                    self._take(index)
            elif self._vector.grad is not self._whole:
                self._share(self._vector.grad)
            elif any(view is None for view in self._views):
                self._share(self._whole)

    def _as_shared(self, index: int) -> bool:
        return self._pieces[index][0].grad is self._views[index]

    def _part(self, index: int) -> Tensor:
        assert self._whole is not None
        return self._within(self._whole, index)

    def _share(self, whole: Tensor | None) -> None:
        """Let every parameter's gradient be its part of ``whole``."""
        self._whole = whole
        # Every step of an optimiser over the vector comes here, so each piece takes one operation.
        start, width = self._vector.data_ptr(), self._vector.element_size()
        with torch.set_grad_enabled(whole is not None and whole.requires_grad):
            for i, (parameter, offset) in enumerate(self._pieces):
                if self._belongs(i, start + offset * width) and parameter.requires_grad:
                    view = None if whole is None else self._within(whole, i)
                    parameter.grad = self._views[i] = view

    def _within(self, whole: Tensor, index: int) -> Tensor:
        """A parameter's part of a gradient of the vector."""
        shape, strides = self._layouts[index]
        offset = self._pieces[index][1]
        if whole.is_contiguous():
            return whole.as_strided(shape, strides, whole.storage_offset() + offset)
        return whole.narrow(0, offset, shape.numel()).view(shape)

    def _take(self, index: int) -> None:
        """Write a parameter's gradient to its part, and let it be that part."""
        parameter, offset = self._pieces[index]
        gradient: Any = parameter.grad
        place = self._vector.data_ptr() + offset * self._vector.element_size()
        if not self._belongs(index, place):
            return
        if self._whole is None:
            self._whole = self._vector.grad = torch.zeros_like(self._vector)
        if gradient.layout != torch.strided:
            gradient = gradient.to_dense()
        # With create_graph=True the gradient has a graph, which the part then carries on.
        with torch.set_grad_enabled(gradient.requires_grad):
            self._part(index).copy_(gradient)
            parameter.grad = self._views[index] = self._part(index)

    def _belongs(self, index: int, place: int) -> bool:
        """Whether the parameter still is at its place in the vector, and not in a later one."""
        parameter, _ = self._pieces[index]
        return parameter.data_ptr() == place or parameter.is_meta or parameter.numel() == 0


def _strides(shape: torch.Size) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides = []
    step = 1
    for side in reversed(shape):
        strides.append(step)
        step *= side
    return tuple(reversed(strides))
