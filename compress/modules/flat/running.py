"""Modules that hold other tensors for a while, and buffers that survive a failed forward."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_GUARD = threading.Lock()
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def lock_of(module: nn.Module) -> threading.RLock:
    """Return the lock to hold while ``module`` holds other tensors than its own.

    Threads that run one module with vectors of their own would otherwise read, and then put back,
    each other's.
    """
    with _GUARD:
        return _LOCKS.setdefault(module, threading.RLock())


@dataclass(frozen=True)
class Place:
    """Where a module holds a parameter or buffer.

    Attributes:
        path: From module to submodule.
        leaf: The tensor's last name.
        name: The tensor's full name, the same for all places of a tied one.
    """

    path: tuple[str, ...]
    leaf: str
    name: str

    @classmethod
    def of(cls, place: str, name: str) -> Place:
        """Read a dotted place, such as ``"0.weight"``."""
        *path, leaf = place.split(".")
        return cls(tuple(path), leaf, name)

    def owner(self, module: nn.Module) -> nn.Module:
        """Return the submodule that holds it."""
        for part in self.path:
            found = module._modules[part]
            assert found is not None
            module = found
        return module


def run_with(
    module: nn.Module, parameters: list[tuple[Place, Tensor]], buffers: list[tuple[Place, Tensor]],
    call: Callable[[], Any],
) -> Any:  # fmt: skip
    """Call something while ``module`` holds other tensors, as `torch.func.functional_call` does.

    That resolves every name anew through several layers of calls, which in small networks takes
    longer than the forward.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for place, value in parameters:
            store: dict[str, Any] = place.owner(module)._parameters
            before.append((store, place.leaf, store[place.leaf]))
            store[place.leaf] = value
        for place, value in buffers:
            store = place.owner(module)._buffers
            before.append((store, place.leaf, store[place.leaf]))
            store[place.leaf] = value
        return call()
    finally:
        for store, leaf, value in before:
            store[leaf] = value


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
def swapped(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[Callable[[], list[str]]]:
    """Let ``module`` hold other parameters and buffers, by name; tied ones follow.

    Yields:
        A function that lists which of them were replaced since, by their last names.
    """
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
        yield lambda: [name for store, name, t in places if store[name] is not new[id(t)]]
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
        for owner in _every_module(module)
        if owner._buffers
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]


def _every_module(module: nn.Module) -> list[nn.Module]:
    """The same as ``modules()``, which also puts names together and takes twice the time."""
    found, seen = [module], {module}
    for owner in found:  # grows on the way
        for child in owner._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def put_back(held: Held) -> None:
    """Write the copies back, and buffers that were replaced to their places."""
    with torch.no_grad():
        for owner, name, buffer, before in held:
            # A torch.func transform that forbids this write has forbidden the forward's as well.
            with contextlib.suppress(RuntimeError):
                buffer.copy_(before)
            if owner is not None:
                owner._buffers[name] = buffer
