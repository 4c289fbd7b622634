"""Traced forwards of a flat module, one for each of its modes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.nn.modules.dropout import _DropoutNd

Modes = tuple[bool, ...]
Function = Callable[..., Any]


@dataclass(frozen=True)
class TracedForms:
    """Traced forwards ``function(vector, *frozen and buffers, *inputs)``.

    Attributes:
        name: Class of the module, for messages.
        forms: By the modes of all its modules.
        count: How many inputs they take.
    """

    name: str
    forms: Mapping[Modes, Function]
    count: int

    def find(self, module: nn.Module) -> Function | None:
        """Return the form that was traced in the modes that ``module`` is in, or None."""
        return self.forms.get(modes_of(module))

    def check(self, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        """Raise ValueError where the inputs are not those it was traced with."""
        if keywords or len(inputs) != self.count:
            raise ValueError(
                f"FlatModule({self.name}) was traced with {self.count} positional inputs; it got "
                f"{len(inputs)} and the keywords {sorted(keywords)}."
            )


@dataclass(frozen=True)
class Example:
    """What a forward is traced on.

    Attributes:
        vector: ``[param_numel]``.
        held: Frozen parameters and buffers; buffers are copied for every trace, which may write
            them.
        inputs: The module's inputs.
        options: For `torch.jit.trace`: check_trace, check_tolerance and strict.
    """

    vector: Tensor
    held: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    options: Mapping[str, Any]


def checked_inputs(example: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the examples as a tuple.

    Raises:
        TypeError: An input that is not a tensor.
    """
    inputs = tuple(example) if isinstance(example, tuple | list) else (example,)
    for value in inputs:
        if not isinstance(value, Tensor):
            raise TypeError(f"trace takes tensors as examples, not a {type(value).__name__}.")
    return tuple(v for v in inputs if isinstance(v, Tensor))


def modes_of(module: nn.Module) -> Modes:
    """Return the mode of every module in it."""
    return tuple(m.training for m in module.modules())


def trace_forms(module: nn.Module, function: Function, example: Example) -> TracedForms:
    """Trace ``function``, which runs ``module``, in its present modes and in the other one.

    Raises:
        Exception: Whatever the trace in the present modes raises. Where only the other mode's
            cannot be traced (BatchNorm in training on a single value), a warning says so.
    """
    name = type(module).__name__
    forms = {modes_of(module): _trace(module, function, example)}
    training = not module.training
    with _modes_kept(module):
        module.train(training)
        other = modes_of(module)
        try:
            forms.setdefault(other, _trace(module, function, example))
        except Exception as error:
            mode = "training" if training else "evaluation"
            warnings.warn(
                f"FlatModule({name}) could not be traced in its {mode} form, which will run "
                f"untraced: {error}",
                UserWarning,
                stacklevel=3,
            )
    return TracedForms(name, forms, len(example.inputs))


def _trace(module: nn.Module, function: Function, example: Example) -> Function:
    options = dict(example.options)
    if any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in module.modules()):
        options["check_trace"] = False  # two runs differ, as they must
    held = tuple(t.detach().clone() for t in example.held)
    arguments = (example.vector.detach(), *held, *example.inputs)
    device = example.vector.device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        warnings.catch_warnings(),
    ):
        # BatchNorm in training looks whether it has more than one value a channel.
        warnings.filterwarnings(
            "ignore", category=TracerWarning, module=r".*torch[./]nn[./]functional"
        )
        # torch leaves trace untyped.
        traced: Function = torch.jit.trace(function, arguments, **options)
    return traced


@contextlib.contextmanager
def _modes_kept(module: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
