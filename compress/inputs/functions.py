"""What outputs are weighed and networks are measured by: the user's own, or what the task says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.config import RunConfig
from compress.data import Batches
from compress.errors import ModelError, what_raised
from compress.running.outputs import Reading, loss_of_all
from compress.running.structure import tensors
from compress.specs import import_function
from compress.tasks import TASKS, TaskMeasure


def loss_function(config: RunConfig, reading: Reading, *, finite: bool = True) -> Any:
    """The user's own loss ``(result, targets) -> summed loss``, or None for Fisher's.

    Where all of a result counts, as of a detector, it is a loss of all that was found.

    It is called with all that the forward returns. Where it need not be ``finite``, the caller
    looks at that.
    """
    if not config.loss_fn:
        return None if reading.parts else loss_of_all(config.seed)
    own = import_function(config.loss_fn, ModelError)

    def checked(result: Any, targets: Any) -> Tensor:
        try:
            value = own(result, targets)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the user's function may raise anything, also SystemExit
            raise ModelError(
                f"--loss-fn {config.loss_fn} raised {what_raised(error)}; it is called with the "
                "outputs and labels of a batch, and returns their summed loss."
            ) from error
        # Where the network's outputs have none the loss is not to blame.
        given = any(output.requires_grad for output in tensors(result).values())
        lost = given and isinstance(value, Tensor) and not value.requires_grad
        if not isinstance(value, Tensor) or value.numel() != 1 or lost:
            raise ModelError(
                "--loss-fn must return one number, the summed loss, as a tensor that gradients "
                f"can be taken of; it gave {type(value).__name__}"
                f"{f' of shape {tuple(value.shape)}' if isinstance(value, Tensor) else ''}."
            )
        if finite and not bool(torch.isfinite(value)):
            raise ModelError(
                f"--loss-fn {config.loss_fn} gave {float(value.detach()):g}; it must return a "
                "finite number for every batch, or the gradients say nothing."
            )
        return value

    return checked


@dataclass(frozen=True)
class Metric:
    """A measure of the user's own.

    Attributes:
        name: What it is called in reports.
        function: ``(model, batches) -> number``, higher is better.
    """

    name: str
    function: Callable[[nn.Module, Batches], float]


def metric_function(config: RunConfig) -> Metric | TaskMeasure | None:
    """The user's own measure, the task's, or None for accuracy."""
    if not config.metric_fn:
        task = TASKS.get(config.task)
        return None if task is None else TaskMeasure(task, config.ignore_index)
    return Metric(config.metric_fn, import_function(config.metric_fn, ModelError))
