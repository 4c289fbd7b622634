"""Traced forwards, and buffers that survive a failed one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd


@dataclass(frozen=True)
class TracedForward:
    """A traced forward ``function(vector, *frozen and buffers, *inputs)`` and what it takes."""

    name: str
    function: Callable[..., Any]
    count: int

    def __call__(
        self,
        vector: Tensor,
        held: Sequence[Tensor],
        inputs: tuple[Any, ...],
        keywords: Mapping[str, Any],
    ) -> Any:
        """Run it, or raise ValueError where the inputs are not those it was traced with."""
        if keywords or len(inputs) != self.count:
            raise ValueError(
                f"FlatModule({self.name}) was traced with {self.count} positional inputs; it got "
                f"{len(inputs)} and the keywords {sorted(keywords)}."
            )
        return self.function(vector, *held, *inputs)


def trace_evaluation(
    module: nn.Module, function: Callable[..., Any], arguments: Sequence[Tensor], count: int
) -> TracedForward:
    """Trace ``function(*arguments)``, which runs ``module``, with the module in evaluation mode.

    Args:
        module: Its modes are as before afterwards; a warning names those that trace differently.
        function: Takes only tensors.
        arguments: Examples.
        count: How many of them, at the end, are the module's inputs.
    """
    active = [
        name or type(m).__name__
        for name, m in module.named_modules()
        if m.training and isinstance(m, _NormBase | _DropoutNd)
    ]
    if active:
        warnings.warn(
            f"FlatModule({type(module).__name__}) is traced in its evaluation form, but "
            f"{len(active)} modules with another training form are in training mode: "
            f"{', '.join(active[:5])}.",
            UserWarning,
            stacklevel=3,
        )
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        # torch leaves trace untyped.
        traced: Callable[..., Any] = torch.jit.trace(  # type: ignore[no-untyped-call]
            function, tuple(arguments), check_trace=False
        )
    finally:
        for part, mode in modes.items():
            part.training = mode
    return TracedForward(type(module).__name__, traced, count)


def state_besides(
    module: nn.Module, names: Collection[str], keep_vars: bool = False
) -> dict[str, Any]:
    """Return the state dict of ``module`` without the parameters ``names``, tied ones included."""
    named = dict(module.named_parameters())
    left_out = {id(named[name]) for name in names}
    return {
        name: value if keep_vars or not isinstance(value, Tensor) else value.detach()
        for name, value in module.state_dict(keep_vars=True).items()
        if id(value) not in left_out
    }


def find_places(module: nn.Module, *, buffers: bool = False) -> list[tuple[str, str]]:
    """List where each parameter (or buffer) is held: ``(place, name)``, every owner once.

    A tied parameter has one name, that of `nn.Module.named_parameters`, and a place for each of
    its owners; an owner that is used twice counts once.
    """
    named = module.named_buffers() if buffers else module.named_parameters()
    names = {id(tensor): name for name, tensor in named}
    return [
        (f"{path}.{leaf}" if path else leaf, names[id(tensor)])
        for path, owner in module.named_modules()
        for leaf, tensor in (owner._buffers if buffers else owner._parameters).items()
        if tensor is not None
    ]


@contextlib.contextmanager
def swapped(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let ``module`` hold other parameters and buffers, by name; tied ones follow."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    new = {id(named[name]): value for name, value in values.items()}
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (store, name, tensor)
        for owner in module.modules()
        for store in (owner._parameters, owner._buffers)
        for name, tensor in store.items()
        if id(tensor) in new and tensor is not None
    ]
    try:
        for store, name, tensor in places:
            store[name] = new[id(tensor)]
        yield
    finally:
        for store, name, tensor in places:
            store[name] = tensor


Held = list[tuple[nn.Module | None, str, Tensor, Tensor]]


def hold_buffers(module: nn.Module, given: dict[str, Tensor] | None) -> Held:
    """Return copies of the buffers that a forward may write, with where they belong."""
    if given is not None:
        return [(None, name, value, value.clone()) for name, value in given.items()]
    return [
        (owner, name, buffer, buffer.clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]


def put_back(held: Held) -> None:
    """Write the copies back, and buffers that were replaced to their places."""
    with torch.no_grad():
        for owner, name, buffer, before in held:
            # A torch.func transform that forbids this write has forbidden the forward's as well.
            with contextlib.suppress(RuntimeError):
                buffer.copy_(before)
            if owner is not None:
                owner._buffers[name] = buffer
