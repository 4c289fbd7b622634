"""Which output a task judges, and what it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.errors import ModelError
from compress.running.outputs import NAMES_OF_LOGITS, Reading, listed_paths
from compress.running.structure import floating
from compress.tasks.record import Task


def read_for(task: Task, result: Any, targets: Sequence[Any], *, sigmoid: bool = False) -> Reading:
    """Decide what outputs stand for where the task is known.

    The judged output is the only one that fits the task and the targets; of several that do, the
    one called ``out`` or ``logits``.

    Args:
        task: The task.
        result: What the original's forward returned for some images.
        targets: What the images' data set says of each, where it says something.
        sigmoid: Whether the network's graph ends in a sigmoid.

    Raises:
        ModelError: No output fits, or several do.
    """
    if not task.looks_for:
        return Reading((), f"all of the result, as the task is {task.name}", False)
    target = next((t for t in targets if task.accepts(t)), None)
    found = {path: t.detach() for path, t in floating(result).items() if t.dim() > 0}
    fitting = [path for path, output in found.items() if task.fits(output, target)]
    named = [path for path in fitting if path.rpartition(".")[2] in NAMES_OF_LOGITS]
    if len(fitting) > 1 and len(named) != 1:
        chosen = ", ".join(fitting)
        raise ModelError(
            f"--task {task.name} judges {task.looks_for}, and several outputs may be that: "
            f"{chosen}. Wrap the model in a module that returns one of them, or calls it 'out'."
        )
    if not fitting:
        shape = getattr(target, "shape", None)
        beside = "" if shape is None else f" (targets have the shape {list(shape)})"
        raise ModelError(
            f"--task {task.name} judges {task.looks_for}{beside}, and no output of the model is "
            f"that: {listed_paths(found) or 'none holds real numbers'}. Check the task and the "
            "data, or wrap the model in a module that returns it."
        )
    path = named[0] if len(fitting) > 1 else fitting[0]
    part = task.read(path, found[path], sigmoid=sigmoid)
    what = {"classes": "logits of classes", "answers": "answers", "values": "values"}[part.kind]
    where = f"the output {path}" if path else "the output"
    return Reading((part,), f"{where}: {what}, as the task is {task.name}", False)
