"""One trace of a network by ``torch.export``, from which every file that is exported is made."""

from __future__ import annotations

import inspect
import io
import os
import re
import traceback
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from compress.deploy.runtimes import OnRuntime, Session
from compress.errors import ModelError, one_line
from compress.libraries.record import quiet
from compress.running.forward import evaluation_mode, run_model
from compress.running.structure import arguments, rebuilt, tensors

INPUT, OUTPUT = "input", "output"
_NO_NAME = re.compile(r"\W+", re.ASCII)
_LONGEST_REASON = 300


class Named(nn.Module):
    """A network that takes its input tensors one by one, and returns its tensors by plain names.

    Args:
        model: The network; its forward may take and return any structures.
        example: A batch of its inputs, for their structure and for all that is no tensor.
        names: Of the tensors that it returns, in the order of `tensors`.
    """

    def __init__(self, model: nn.Module, example: Any, names: Iterable[str]) -> None:
        super().__init__()
        self.model = model
        self.example = example
        self.names = tuple(names)

    def forward(self, *inputs: Tensor) -> Any:
        """Return the tensors by name, or the tensor where there is one."""
        by_position, by_name = arguments(rebuilt(self.example, inputs))
        found = list(tensors(self.model(*by_position, **by_name)).values())
        return found[0] if len(found) == 1 else dict(zip(self.names, found, strict=True))


@dataclass(frozen=True)
class Traced:
    """A network as ``torch.export`` sees it.

    Attributes:
        program: Its forward as a graph, which takes the input tensors by position and returns a
            tensor, or a dict by name.
        inputs: The names of the input tensors, in the order of `tensors`.
        outputs: The names of the output tensors, in the order of `tensors`.
        like: What the network itself returned, whose structure a runtime's outputs are put into.
        batch: The batch size that is taken; None for any.
    """

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    like: Any
    batch: int | None

    def on(self, session: Session, reference: Tensor) -> OnRuntime:
        """Return the network as a runtime's session computes it; see `OnRuntime`."""
        return OnRuntime(session, self.inputs, self.like, reference)


def trace(model: nn.Module, example: Any, batch: int | None = None) -> Traced:
    """Trace a network whose batch size is left open, or fixed.

    Args:
        model: The network, contiguous and in the dtype that is to be exported.
        example: A batch of inputs, of ``batch`` images or, where that is open, of at least two.
        batch: The fixed batch size; None leaves it open.

    Raises:
        ModelError: The forward fails, or depends on its data or on the batch size in a way that no
            graph holds.
    """
    given = tuple(tensors(example).values())
    with torch.no_grad(), evaluation_mode(model):
        like = run_model(model, example)
        outputs = plain_names(tensors(like), OUTPUT)
        named = Named(model, example, outputs).eval()
        opened = None if batch else {"inputs": ({0: Dim("batch", min=1)},) * len(given)}
        try:
            # Where it fails, torch prints what it had traced so far.
            with quiet(), redirect_stderr(io.StringIO()):
                program = torch.export.export(named, given, dynamic_shapes=opened, strict=False)
        except Exception as error:  # torch's own, sympy's, and whatever the forward raises
            raise ModelError(_why_not(error, fixed=batch is not None)) from error
    inputs = plain_names(_inputs_by_name(model, example), INPUT, taken=outputs)
    return Traced(program, inputs, outputs, like, batch)


def plain_names(paths: Iterable[str], only: str, taken: Iterable[str] = ()) -> tuple[str, ...]:
    """Return names of letters, digits and ``_`` for the paths of tensors, no two the same.

    Args:
        paths: As `tensors` gives them, such as ``"out.aux"``.
        only: The name of a tensor that is all there is, and what others begin with that would
            begin with a digit.
        taken: Names that must not be used.
    """
    names: list[str] = []
    used = set(taken)
    for path in paths:
        plain = _NO_NAME.sub("_", path).strip("_")
        if not plain or plain[0].isdigit():
            plain = f"{only}_{plain}" if plain else only
        name, count = plain, 1
        while name in used:
            count += 1
            name = f"{plain}_{count}"
        used.add(name)
        names.append(name)
    return tuple(names)


def _inputs_by_name(model: nn.Module, example: Any) -> Iterable[str]:
    """The paths of the input tensors; of those given by position, by the forward's own names."""
    paths = tensors(example)
    if isinstance(example, Tensor | Mapping):
        return paths
    try:
        own = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):  # a forward without a signature
        own = []
    begun = {f"[{index}]": name for index, name in enumerate(own)}
    parts = ((path, path.find("]") + 1) for path in paths)
    return [begun.get(path[:end], path[:end]) + path[end:] for path, end in parts]


def _why_not(error: Exception, *, fixed: bool) -> str:
    """What keeps a network from being traced, and what to do about it."""
    kind, said = type(error).__name__, one_line(error)[:_LONGEST_REASON]
    if "DataDependent" in kind or "data-dependent" in said:
        return (
            "The network cannot be exported: its forward decides by the values of its data"
            f"{_where(error)}, which no exported graph can hold. Rewrite that decision with "
            "torch.where, or export the part of the network that has none."
        )
    if not fixed and "batch" in said and ("Constraint" in said or "specialized" in said):
        return (
            "The network cannot be exported for batches of any size: its forward computes with the "
            "batch size of the example. Pass --fixed-batch N to export it for batches of N."
        )
    return (
        f"The network cannot be exported: torch.export raised {kind}: {said}. Where that is about "
        "the size of the batch, --fixed-batch N exports it for batches of N."
    )


def _where(error: Exception) -> str:
    """The line of the network's code that an error came out of, to be read behind a phrase."""
    known = tuple(os.path.dirname(os.path.abspath(f)) + os.sep for f in (torch.__file__, __file__))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith(("<", *known))]
    if not theirs:
        return ""
    return f" ({os.path.basename(theirs[-1].filename)}, line {theirs[-1].lineno})"
