"""A module behind one flat parameter vector.

What torchreparam's ReparamModule does by swapping attributes is done here by
`torch.func.functional_call`, so that it works with every transform of `torch.func`, with autograd
of any order (Finn et al., "Model-Agnostic Meta-Learning", 2017) and with BatchNorm in training.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from compress.modules.flat.checks import Buffers, check_parameters, check_state, checked_buffers
from compress.modules.flat.running import (
    TracedForward,
    find_places,
    hold_buffers,
    put_back,
    state_besides,
    swapped,
    trace_evaluation,
)


class FlatModule(nn.Module):
    """Put ``module`` behind a single parameter vector.

    The only parameter is `flat_param`, in the order of
    ``torch.nn.utils.parameters_to_vector(module.parameters())``, tied parameters once. It shares
    storage with the module's parameters: editing one in place shows in the other.

    Parameters that are frozen when the module is wrapped keep their places in the vector, but the
    forward reads them from ``module`` itself, where nothing that moves the vector (weight decay)
    reaches them.

    Args:
        module: Any module; it is kept, not copied, as the attribute ``module``, and follows this
            one's mode, dtype and device. It is not a submodule: ``modules()`` does not list it.

    Attributes:
        flat_param: The vector ``[param_numel]``.
        param_numel: Its length.
        shapes: Shape of each parameter by name, in order.
        is_traced: Whether `trace` took place.

    Raises:
        TypeError: ``module`` is not a module.
        ValueError: Parameters of several dtypes or devices, or not initialised yet.
    """

    flat_param: nn.Parameter
    module: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"FlatModule wraps an nn.Module, not a {type(module).__name__}.")
        named = dict(module.named_parameters())
        check_parameters(type(module).__name__, named)
        self.shapes: dict[str, torch.Size] = {name: p.shape for name, p in named.items()}
        self.param_numel = sum(p.numel() for p in named.values())
        self._trained = tuple(name for name, p in named.items() if p.requires_grad)
        self._places = tuple(
            (place, name) for place, name in find_places(module) if name in self._trained
        )
        self._traced: TracedForward | None = None
        # Not registered: its parameters are not parameters of this module.
        object.__setattr__(self, "module", module)
        pieces = [p.detach().reshape(-1) for p in named.values()]
        vector = torch.cat(pieces) if pieces else torch.zeros(0)
        self.flat_param = nn.Parameter(vector, requires_grad=bool(self._trained) or not named)
        self.training = module.training

    @property
    def is_traced(self) -> bool:
        """Whether the forward is a traced one."""
        return self._traced is not None

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
        pieces = torch.split(vector, [math.prod(shape) for shape in self.shapes.values()])
        return {
            name: piece.view(shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }

    def forward(
        self,
        *inputs: Any,
        flat_param: Tensor | None = None,
        buffers: Buffers | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the module.

        Args:
            *inputs: Its inputs.
            flat_param: Vector ``[param_numel]`` to use instead of the own one.
            buffers: Buffers to use instead of the own ones, by name or in the order of
                ``module.buffers()``. BatchNorm updates go into them; the module's own, for names
                that are left out too, stay as they are.
            **kwargs: Keyword arguments of the module.

        Raises:
            ValueError: A vector or buffers of another length, shape, dtype or device.
        """
        vector = self.flat_param if flat_param is None else flat_param
        self._check_vector(vector)
        given = None if buffers is None else checked_buffers(self.module, buffers)
        if self._traced is not None:
            values = list(self.module.buffers()) if given is None else list(given.values())
            return self._traced(vector, [*self._frozen(), *values], inputs, kwargs)
        everything = self._views(vector)
        tensors = {place: everything[name] for place, name in self._places}
        if given is not None:
            tensors |= {p: given[n] for p, n in find_places(self.module, buffers=True)}
        if torch.compiler.is_compiling():
            return self._call(tensors, inputs, kwargs)
        held = hold_buffers(self.module, given)
        try:
            return self._call(tensors, inputs, kwargs)
        except BaseException:
            put_back(held)
            raise

    def _call(
        self, tensors: dict[str, Tensor], inputs: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # With tie_weights=True functional_call would not restore modules that are used twice: it
        # swaps them once for each name and takes the first swap for what was there.
        return torch.func.functional_call(self.module, tensors, inputs, kwargs, tie_weights=False)

    def trace(self, example: Tensor | tuple[Tensor, ...]) -> Self:
        """Replace the forward by one traced on ``example``, and return self.

        The traced forward takes ``flat_param=`` and ``buffers=`` as before. It is the evaluation
        form whatever the mode, with a warning where that makes a difference. Copies, and this
        module after ``.to(...)``, are not traced.

        Args:
            example: The input, or a tuple of all inputs.

        Raises:
            TypeError: An input that is not a tensor.
        """
        inputs = example if isinstance(example, tuple) else (example,)
        for value in inputs:
            if not isinstance(value, Tensor):
                raise TypeError(f"trace takes tensors as examples, not a {type(value).__name__}.")
        names = [name for name in self.shapes if name not in self._trained]
        names += [name for name, _ in self.module.named_buffers()]

        # functional_call refuses to be traced.
        def run(vector: Tensor, *tensors: Tensor) -> Any:
            everything = self._views(vector)
            values = {name: everything[name] for name in self._trained}
            values |= dict(zip(names, tensors, strict=False))
            with swapped(self.module, values):
                return self.module(*tensors[len(names) :])

        arguments = (self.flat_param.detach(), *self._frozen(), *self.module.buffers(), *inputs)
        self._traced = trace_evaluation(self.module, run, arguments, len(inputs))
        return self

    def _frozen(self) -> list[Tensor]:
        named = dict(self.module.named_parameters())
        return [named[name].detach() for name in self.shapes if name not in self._trained]

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

    # What keeps the module and the vector one: storage, mode, dtype and device, state.

    def _tie(self) -> None:
        named = dict(self.module.named_parameters())
        views = self.unflatten(self.flat_param.detach())
        for name in self._trained:
            named[name].data = views[name]
        for inner in self.module.modules():
            if isinstance(inner, FlatModule):
                inner._tie()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "flat_param" and "flat_param" in self._parameters:
            self._check_vector(value)
        super().__setattr__(name, value)
        if name == "flat_param":
            self._tie()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # torch leaves _apply untyped.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.module._apply(fn, recurse)  # type: ignore[no-untyped-call]
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
        return {**self.__dict__, "_traced": None, "module": copy.deepcopy(self.module, hollow)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # untyped in torch
        self._tie()

    def extra_repr(self) -> str:
        """Show the wrapped module's class and the length of the vector."""
        return f"{type(self.module).__name__}, param_numel={self.param_numel}"
