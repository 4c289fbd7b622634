"""Which channels the forward itself takes notice of, found out by taking some out.

The graph holds numbers as they were when it was recorded. A forward that asks how many channels a
tensor has, as in ``x / x.shape[1]`` or ``if x.shape[1] == 32``, does something else in a narrower
network than its graph says, and all that is predicted of it is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from compress.network.channels import ChannelMap
from compress.network.narrowing import Part, cut
from compress.network.sites import LayerSite
from compress.running.forward import evaluation_mode, forward_hooks, run_model
from compress.running.structure import cloned, concatenated, tensors

# The same layers on the same numbers: how far apart, in parts of the largest number.
ROUNDING = 1e-5
# So many numbers of a tensor are compared, drawn where it has more.
LOOKED_AT = 1 << 20
# The shares of a group's channels that are tried.
SHARES = (0.75, 0.3)
REASON = "the forward takes another way, or other numbers, with fewer of its channels"


def without_noticed(
    model: nn.Module,
    graph: fx.Graph | None,
    sites: Sequence[LayerSite],
    channels: ChannelMap,
    example: Any,
) -> ChannelMap:
    """Leave the groups whose number of channels the forward takes notice of.

    Args:
        model: The network, norms folded.
        graph: Its graph.
        sites: Its layers.
        channels: Its channels.
        example: One image's inputs ``[1, ...]``.
    """
    if graph is None or not channels.groups:
        return channels

    def unnoticed(names: Sequence[str]) -> bool:
        sizes = {name: channels.group(name).size for name in names}
        for share in SHARES:
            parts = {n: Part(torch.arange(max(1, int(size * share)))) for n, size in sizes.items()}
            if not is_faithful(cut(model, sites, channels, parts, {}).model, graph, example):
                return False
        return True

    names = [group.name for group in channels.groups]
    if unnoticed(names):
        return channels
    noticed = {name for name in names if not unnoticed([name])} or set(names)
    pairs = zip(channels.groups, channels.members, strict=True)
    fine = [(group, labels) for group, labels in pairs if group.name not in noticed]
    left = {
        slot.name: REASON
        for group in channels.groups if group.name in noticed
        for slot in group.producers
    }  # fmt: skip
    return replace(
        channels,
        groups=tuple(group for group, _ in fine),
        members=tuple(labels for _, labels in fine),
        left={**channels.left, **left},
    )


def is_faithful(model: nn.Module, graph: fx.Graph, example: Any) -> bool:
    """Whether a network's forward computes what a graph does, at every module that it calls.

    Where one of them fails, as at a number of channels that does not fit, it does not.

    Args:
        model: The network, or a narrower one that has modules of the same names.
        graph: Its graph.
        example: One image's inputs ``[1, ...]``.
    """
    images = concatenated([example, example])
    traced = fx.GraphModule(model, graph)
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    try:
        first = _seen(model, called, lambda: tensors(run_model(model, images)).values())
        second = _seen(model, called, lambda: traced.forward(cloned(images)))
    except Exception:  # the user's forward may raise anything
        return False
    return len(first) == len(second) and all(map(_same, first, second))


def _seen(
    model: nn.Module, names: Iterable[str], run: Callable[[], Iterable[Tensor]]
) -> list[Tensor]:
    """What some modules get, in order, and what comes out in the end.

    Of large tensors some numbers, since all of a network's activations can be much: drawn, as a
    fixed step could always meet the same channel.
    """
    found: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Any, ...], __: object) -> None:
        found.extend(some(t) for t in inputs if isinstance(t, Tensor))

    def some(tensor: Tensor) -> Tensor:
        flat = tensor.detach().flatten()
        if len(flat) <= LOOKED_AT:
            return tensor.detach().clone()
        generator = torch.Generator().manual_seed(len(flat))
        drawn = torch.randint(len(flat), (LOOKED_AT,), generator=generator)
        return flat[drawn.to(flat.device)]

    hooks = forward_hooks({model.get_submodule(name): hook for name in names})
    with evaluation_mode(model), torch.no_grad(), hooks:
        found += map(some, run())
    return found


def _same(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or not first.is_floating_point():
        return first.shape == second.shape
    finite = first[first.isfinite()]
    near = (first - second).abs() <= ROUNDING * float(finite.abs().max() if len(finite) else 0)
    same = (first == second) | (first.isnan() & second.isnan())  # a mask may hold infinities
    return bool((near | same).all())
