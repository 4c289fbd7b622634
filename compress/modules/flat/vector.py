"""One vector that shares storage, gradients and state with the parameters of a module."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from compress.modules.flat.checks import check_parameters, check_state
from compress.modules.flat.gradients import SharedGradient
from compress.modules.flat.running import Place, find_places, state_besides
from compress.modules.flat.tracing import TracedForms


class SharedVector(nn.Module):
    """What makes the vector and the module one: storage, gradients, mode, dtype, device and state.

    Args:
        module: Any module, kept as the attribute ``module``.

    Raises:
        TypeError: ``module`` is not a module.
        ValueError: Parameters of several dtypes or devices, or not initialised yet.
    """

    flat_param: nn.Parameter
    module: nn.Module
    _gradients: SharedGradient | None = None
    # Neither moves nor copies keep a trace, or the vector of a block that is running.
    _traced: TracedForms | None = None
    _inside: Tensor | None = None
    _lock: threading.RLock | None = None

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"FlatModule wraps an nn.Module, not a {type(module).__name__}.")
        named = dict(module.named_parameters())
        check_parameters(type(module).__name__, named)
        self.shapes: dict[str, torch.Size] = {name: p.shape for name, p in named.items()}
        self._sizes = [shape.numel() for shape in self.shapes.values()]
        self.param_numel = sum(self._sizes)
        self._trained = tuple(name for name, p in named.items() if p.requires_grad)
        self._places = tuple(
            Place.of(place, name) for place, name in find_places(module) if name in self._trained
        )
        # Not registered: its parameters are not parameters of this module.
        object.__setattr__(self, "module", module)
        pieces = [p.detach().reshape(-1) for p in named.values()]
        vector = torch.cat(pieces) if pieces else torch.zeros(0)
        self.flat_param = nn.Parameter(vector, requires_grad=bool(self._trained) or not named)
        self.training = module.training

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """Names of the parameters that were frozen when the module was wrapped."""
        return tuple(name for name in self.shapes if name not in self._trained)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the parameters by name as views of ``vector`` ``[param_numel]``.

        Raises:
            ValueError: Another shape.
        """
        if vector.shape != (self.param_numel,):
            raise ValueError(self._expected("a vector of shape", tuple(vector.shape)))
        return self._views(vector)

    def _views(self, vector: Tensor) -> dict[str, Tensor]:
        # One split, whose backward is one concatenation.
        pieces = vector.split_with_sizes(self._sizes)
        return {
            name: piece.view(shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }

    def _expected(self, what: str, got: object) -> str:
        return (
            f"FlatModule({type(self.module).__name__}) expects a flat_param of {self.param_numel} "
            f"entries, {self.flat_param.dtype} on {self.flat_param.device}; it got {what} {got}."
        )

    def _check_vector(self, vector: Tensor) -> None:
        if not isinstance(vector, Tensor):
            raise TypeError(self._expected("a", type(vector).__name__))
        if vector.shape != (self.param_numel,):
            raise ValueError(self._expected("a vector of shape", tuple(vector.shape)))
        if vector.dtype != self.flat_param.dtype:
            raise ValueError(self._expected("the dtype", vector.dtype))
        if vector.device != self.flat_param.device:
            raise ValueError(self._expected("one on", vector.device))

    def _tie(self) -> None:
        named = dict(self.module.named_parameters())
        views = self.unflatten(self.flat_param.detach())
        for name in self._trained:
            named[name].data = views[name]
        if self._gradients is not None:
            self._gradients.release()
        starts = dict(zip(self.shapes, self._starts(), strict=True))
        pieces = [(named[name], starts[name]) for name in self._trained]
        self._gradients = SharedGradient(self.flat_param, pieces)
        for inner in self.module.modules():
            if isinstance(inner, SharedVector):
                inner._tie()

    def _starts(self) -> Iterator[int]:
        start = 0
        for size in self._sizes:
            yield start
            start += size

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradient of the vector and of the module's parameters, which are one."""
        if self._gradients is None:
            super().zero_grad(set_to_none)
        elif set_to_none:
            self._gradients.clear()
        else:
            self._gradients.zero()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "flat_param" and "flat_param" in self._parameters:
            self._check_vector(value)
        super().__setattr__(name, value)
        if name == "flat_param":
            self._tie()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # torch leaves _apply untyped.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.module._apply(fn, recurse)
        self._traced = None
        self._tie()
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this and the wrapped module."""
        super().train(mode)
        self.module.train(mode)
        return self

    def apply(self, fn: Callable[[nn.Module], Any]) -> Self:
        """Apply ``fn`` to every wrapped module, then to this one."""
        self.module.apply(fn)
        return super().apply(fn)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the wrapped module's buffers by the names that ``buffers=`` takes."""
        return self.module.named_buffers(prefix, recurse, remove_duplicate)

    def module_state_dict(self) -> dict[str, Tensor]:
        """Return the state dict of the wrapped module, as copies."""
        return OrderedDict((name, value.clone()) for name, value in self._module_state().items())

    def _module_state(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.module.state_dict().items() if isinstance(v, Tensor)}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load this module's state dict, or the wrapped module's own.

        Raises:
            ValueError: ``assign=True``, which would separate the vector from the module.
            RuntimeError: Missing, unexpected or misshapen entries; nothing is loaded.
        """
        if assign:
            raise ValueError(
                "FlatModule cannot load with assign=True: its parameters share one storage."
            )
        flat = "flat_param" in state_dict
        expected = self.state_dict() if flat else self.module.state_dict()
        check_state(type(self.module).__name__, state_dict, expected, strict)
        if flat:
            return super().load_state_dict(state_dict, strict)
        result = self.module.load_state_dict(state_dict, strict)
        self._copy_frozen()
        return result

    def _copy_frozen(self) -> None:
        """Show the frozen parameters in the vector as well."""
        views = self.unflatten(self.flat_param.detach())
        for name, p in self.module.named_parameters():
            if name not in self._trained:
                views[name].copy_(p.detach())

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        rest = state_besides(self.module, self._trained, keep_vars)
        destination.update({f"{prefix}module.{name}": value for name, value in rest.items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        start = f"{prefix}module."
        rest = {k[len(start) :]: v for k, v in state_dict.items() if k.startswith(start)}
        own = {k: v for k, v in state_dict.items() if not k.startswith(start)}
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        wanted = state_besides(self.module, self._trained)
        try:
            result = self.module.load_state_dict(rest, strict=False)
        except RuntimeError as error:
            error_msgs.append(str(error))
            return
        missing_keys += [f"{start}{k}" for k in result.missing_keys if k in wanted]
        unexpected_keys += [f"{start}{k}" for k in result.unexpected_keys]
        self._tie()

    def __getstate__(self) -> dict[str, Any]:
        # Views of the vector would each be written with the whole of its storage.
        hollow: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty(0, dtype=p.dtype, device=p.device))
            for name, p in self.module.named_parameters()
            if name in self._trained
        }
        left = {"_traced": None, "_gradients": None, "_inside": None, "_lock": None}
        return {**self.__dict__, **left, "module": copy.deepcopy(self.module, hollow)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # of torch's
        self._tie()

    def extra_repr(self) -> str:
        """Show the wrapped module's class and the length of the vector."""
        return f"{type(self.module).__name__}, param_numel={self.param_numel}"
