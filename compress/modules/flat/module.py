"""A module behind one flat parameter vector.

What torchreparam's ReparamModule does by swapping attributes is done here by
`torch.func.functional_call`, so that it works with every transform of `torch.func`, with autograd
of any order (Finn et al., "Model-Agnostic Meta-Learning", 2017) and with BatchNorm in training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from compress.modules.flat.checks import Buffers, checked_buffers
from compress.modules.flat.running import (
    Place,
    find_places,
    hold_buffers,
    lock_of,
    put_back,
    run_with,
    swapped,
)
from compress.modules.flat.tracing import Example, checked_inputs, trace_forms
from compress.modules.flat.vector import SharedVector


class FlatModule(SharedVector):
    """Put ``module`` behind a single parameter vector.

    The only parameter is `flat_param`, in the order of
    ``torch.nn.utils.parameters_to_vector(module.parameters())``, tied parameters once. It shares
    storage with the module's parameters: editing one in place shows in the other. Their gradients
    are one as well: a backward pass through ``module`` itself fills ``flat_param.grad``, one
    through this module fills the parameters', and an optimiser over either trains both.

    Threads may run this module with vectors of their own at the same time; they take turns.

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

    @property
    def is_traced(self) -> bool:
        """Whether the forward is a traced one."""
        return self._traced is not None

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
        if torch.compiler.is_compiling():
            return self._run(flat_param, buffers, inputs, kwargs)
        lock = self._lock
        if lock is None:
            lock = self._lock = lock_of(self.module)
        with lock:
            return self._run(flat_param, buffers, inputs, kwargs)

    def _run(
        self,
        flat_param: Tensor | None,
        buffers: Buffers | None,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        vector = flat_param
        if vector is None:
            vector = self.flat_param if self._inside is None else self._inside
        else:
            self._check_vector(vector)
        given = None if buffers is None else checked_buffers(self.module, buffers)
        if self._traced is not None:
            self._traced.check(inputs, kwargs)
        traced = None if self._traced is None else self._traced.find(self.module)
        if torch.compiler.is_compiling():
            return self._functional(vector, given, inputs, kwargs)
        held = hold_buffers(self.module, given)
        try:
            if traced is not None:
                values = self.module.buffers() if given is None else given.values()
                return traced(vector, *self._frozen(), *values, *inputs)
            if _is_tracing() or isinstance(self.module, torch.jit.ScriptModule):
                return self._functional(vector, given, inputs, kwargs)  # refuses both
            everything = self._views(vector)
            return run_with(
                self.module,
                [(place, everything[place.name]) for place in self._places],
                [] if given is None else self._buffer_places(given),
                lambda: self.module(*inputs, **kwargs),
            )
        except BaseException:
            put_back(held)
            raise

    def _buffer_places(self, given: dict[str, Tensor]) -> list[tuple[Place, Tensor]]:
        places = find_places(self.module, buffers=True)
        return [(Place.of(place, name), given[name]) for place, name in places]

    def _functional(
        self,
        vector: Tensor,
        given: dict[str, Tensor] | None,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The same for a compiler, which knows this function of torch's."""
        everything = self._views(vector)
        places = find_places(self.module)
        tensors = {place: everything[name] for place, name in places if name in self._trained}
        if given is not None:
            tensors |= {p: given[n] for p, n in find_places(self.module, buffers=True)}
        # With tie_weights=True functional_call would not restore modules that are used twice: it
        # swaps them once for each name and takes the first swap for what was there.
        return torch.func.functional_call(self.module, tensors, inputs, kwargs, tie_weights=False)

    @contextlib.contextmanager
    def unflattened(self, vector: Tensor, buffers: Buffers | None = None) -> Iterator[nn.Module]:
        """Let the wrapped module run on another vector: all of its methods, not only the forward.

        Inside the block its parameters are views of ``vector``, so that gradients reach the vector,
        and this module runs with the vector too. Afterwards, also after an exception, they are its
        own again. Other threads that run this module wait for the end of the block.

        Args:
            vector: ``[param_numel]``.
            buffers: As `forward` takes them.

        Yields:
            The wrapped module.

        Raises:
            ValueError: A vector or buffers of another length, shape, dtype or device.
        """
        with lock_of(self.module):
            self._check_vector(vector)
            values = {} if buffers is None else checked_buffers(self.module, buffers)
            views = self._views(vector)
            values |= {name: views[name] for name in self._trained}
            outer = self._inside
            with swapped(self.module, values):
                self._inside = vector
                try:
                    yield self.module
                finally:
                    self._inside = outer

    def trace(
        self,
        example: Tensor | Sequence[Tensor],
        *,
        check_trace: bool = True,
        check_tolerance: float = 1e-5,
        strict: bool = True,
    ) -> Self:
        """Replace the forward by forms traced on ``example``, and return self.

        The training and the evaluation form are both traced, and the module's mode says which runs;
        in other modes (one BatchNorm frozen afterwards) it runs untraced. They take ``flat_param=``
        and ``buffers=`` as before. Copies, and this module after ``.to(...)``, are not traced.

        Args:
            example: The input, or a list or tuple of all inputs.
            check_trace: Whether to compare each form with a second run (not while dropout draws).
            check_tolerance: For that comparison.
            strict: As `torch.jit.trace` takes it.

        Raises:
            TypeError: An input that is not a tensor.
            ValueError: A forward that replaces a buffer, which a traced one would lose.
        """
        inputs = checked_inputs(example)
        names = list(self.frozen_names)
        names += [name for name, _ in self.module.named_buffers()]

        # functional_call refuses to be traced.
        def run(vector: Tensor, *tensors: Tensor) -> Any:
            everything = self._views(vector)
            values = {name: everything[name] for name in self._trained}
            values |= dict(zip(names, tensors, strict=False))
            with swapped(self.module, values) as replaced:
                output = self.module(*tensors[len(names) :])
                if lost := replaced():
                    raise ValueError(
                        f"FlatModule({type(self.module).__name__}) cannot be traced: its forward "
                        f"replaces {', '.join(lost)}, which a traced forward would not. Write them "
                        "in place (copy_, add_)."
                    )
            return output

        options = {
            "check_trace": check_trace, "check_tolerance": check_tolerance, "strict": strict,
        }  # fmt: skip
        held = (*self._frozen(), *self.module.buffers())
        with lock_of(self.module):
            self._traced = trace_forms(
                self.module, run, Example(self.flat_param, held, inputs, options)
            )
        return self

    def _frozen(self) -> list[Tensor]:
        named = dict(self.module.named_parameters())
        return [named[name].detach() for name in self.frozen_names]


def _is_tracing() -> bool:
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # torch's
    return tracing
