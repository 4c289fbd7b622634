"""What a result takes beside the dense network on the runtime asked for, and on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from compress.config import COMPILE, TORCH
from compress.deploy.engines import Engine, can_export, exported
from compress.errors import ModelError
from compress.result import Latency
from compress.running.structure import expanded, main_tensor
from compress.timing.runtimes import time_runtimes

Networks = dict[str, nn.Module]


def on_runtimes(
    models: Mapping[str, nn.Module],
    example: Any,
    engine: Engine,
    batches: Sequence[int],
    most_seconds: float,
) -> tuple[tuple[Latency, ...], tuple[str, ...]]:
    """Time networks on a runtime, on torch and on all that are installed, in turns.

    Args:
        models: The ``"dense"`` and the ``"compressed"`` network, or the latter alone.
        example: The inputs of one image ``[1, ...]``, as the networks take them.
        engine: The runtime asked for; its times come first.
        batches: Batch sizes.
        most_seconds: How long the timing may take, exports not counted.

    Returns:
        Times by runtime and batch, and why other runtimes are not among them. Without a dense
        network its times are those of the compressed one.

    Raises:
        ModelError: The runtime asked for does not take a network.
    """
    inputs = [expanded(example, batch) for batch in batches]
    found: dict[str, Networks] = {}
    problems: dict[str, None] = {}
    for which, model in models.items():
        found[which], refused = _everywhere(model, inputs, engine)
        problems |= dict.fromkeys(refused)
    final = found["compressed"]
    dense = found.get("dense", {})
    common = [name for name in final if name in dense or not dense]
    common.sort(key=lambda name: name != engine.name)
    times = time_runtimes(
        {name: final[name] for name in common},
        {name: dense[name] for name in common if dense},
        example,
        batches,
        most_seconds,
    )
    rows = []
    for each in times:
        original = each.seconds if each.original is None else each.original
        rows.append(
            Latency(
                each.batch_size, original, each.seconds, each.seconds / original,
                runtime=each.runtime,
            )
        )  # fmt: skip
    return tuple(rows), tuple(problems)


def _everywhere(
    model: nn.Module, inputs: Sequence[Any], engine: Engine
) -> tuple[Networks, tuple[str, ...]]:
    """A network on all runtimes, and why some do not take it."""
    networks: Networks = {TORCH: model}
    if engine.name == COMPILE:
        networks[COMPILE] = engine.network(model, inputs)
    if not can_export() or main_tensor(inputs[0]).device.type != "cpu":
        return networks, ()
    try:
        found, problems = exported(model, inputs)
    except ModelError as error:
        found, problems = {}, (str(error),)
    if engine.name not in (*networks, *found):
        raise ModelError(" ".join(problems))
    return {**networks, **found}, problems
