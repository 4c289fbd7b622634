"""State dicts of HyperLight's `HyperNet`, to and from those of `Hypernet`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.modules.hypernet.network import Hypernet
from compress.modules.hypernet.sizes import shape as checked_shape

Shapes = Mapping[str, Sequence[int]]


def state_dict_from_hyperlight(
    hypernet: Hypernet, state: Mapping[str, Tensor], output_shapes: Shapes
) -> dict[str, Tensor]:
    """Return what ``hypernet.load_state_dict`` takes for a state dict of HyperLight's `HyperNet`.

    Args:
        hypernet: Of the same shapes, hidden sizes and encoding.
        state: With keys ``backbone.block0_lin.weight``, ..., ``backbone.output.bias``.
        output_shapes: As the original network was given them. Their order matters: its last layer
            has its rows in that order and the state dict does not hold it.

    Returns:
        Copies of the tensors. With them ``hypernet`` emits what the original emits.

    Raises:
        ValueError: Other outputs or shapes than those of ``hypernet``, missing or unexpected keys.
    """
    order = _rows(hypernet, output_shapes)
    pairs = _hidden_keys(hypernet)
    wanted = {key: tuple(own.shape) for key, (_, own) in pairs.items()}
    wanted["backbone.output.weight"] = tuple(hypernet.output.weight.shape)
    wanted["backbone.output.bias"] = (hypernet.output.out_features,)
    _check_state(wanted, state)
    converted = {own: state[key].detach().clone() for key, (own, _) in pairs.items()}
    rows = torch.cat([order[name] for name in hypernet.output_shapes])
    converted["output.weight"] = state["backbone.output.weight"].detach()[rows].clone()
    bias = state["backbone.output.bias"].detach()
    for index, (name, shape) in enumerate(hypernet.output_shapes.items()):
        converted[f"independent.{index}"] = bias[order[name]].reshape(shape).clone()
    return converted


def state_dict_to_hyperlight(hypernet: Hypernet, output_shapes: Shapes) -> dict[str, Tensor]:
    """Return the state dict that HyperLight's `HyperNet` takes to emit what ``hypernet`` emits.

    Args:
        hypernet: Without normalisation layers, which HyperLight has not.
        output_shapes: In the order in which the original network gets them.

    Raises:
        ValueError: Other outputs or shapes than those of ``hypernet``, normalisation layers.
    """
    order = _rows(hypernet, output_shapes)
    pairs = _hidden_keys(hypernet)
    if len(pairs) != len(hypernet.hidden.state_dict()):
        raise ValueError("The hypernetwork has normalisation layers, which HyperLight has not.")
    state = {key: own.detach().clone() for key, (_, own) in pairs.items()}
    weight = torch.empty_like(hypernet.output.weight)
    bias = torch.empty(hypernet.output.out_features, dtype=weight.dtype, device=weight.device)
    rows = torch.cat([order[name] for name in hypernet.output_shapes])
    weight[rows] = hypernet.output.weight.detach()
    fixed = hypernet.independent_weights()
    bias[rows] = torch.cat([fixed[n].flatten().to(bias.dtype) for n in hypernet.output_shapes])
    return {**state, "backbone.output.weight": weight.detach(), "backbone.output.bias": bias}


def _rows(hypernet: Hypernet, output_shapes: Shapes) -> dict[str, Tensor]:
    """For each output the rows of the original's last layer."""
    shapes = {n: checked_shape(f"output_shapes[{n!r}]", s) for n, s in dict(output_shapes).items()}
    if shapes != hypernet.output_shapes:
        names = sorted(
            name
            for name in {*shapes, *hypernet.output_shapes}
            if shapes.get(name) != hypernet.output_shapes.get(name)
        )
        raise ValueError(
            f"output_shapes are not those of the hypernetwork; they differ in {', '.join(names)}."
        )
    rows, start = {}, 0
    for name, shape in shapes.items():
        rows[name] = torch.arange(start, start + math.prod(shape))
        start += math.prod(shape)
    return rows


def _hidden_keys(hypernet: Hypernet) -> dict[str, tuple[str, Tensor]]:
    """HyperLight's key for each tensor of the hidden layers, with this package's and the tensor."""
    keys: dict[str, tuple[str, Tensor]] = {}
    linear = [(i, m) for i, m in enumerate(hypernet.hidden) if isinstance(m, nn.Linear)]
    for block, (index, layer) in enumerate(linear):
        for leaf, value in (("weight", layer.weight), ("bias", layer.bias)):
            keys[f"backbone.block{block}_lin.{leaf}"] = (f"hidden.{index}.{leaf}", value)
    return keys


def _check_state(wanted: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    if missing or unexpected:
        raise ValueError(
            f"The state dict does not fit the hypernetwork: missing {missing}, "
            f"unexpected {unexpected}."
        )
    for key, shape in wanted.items():
        if tuple(state[key].shape) != shape:
            raise ValueError(f"{key} has shape {tuple(state[key].shape)}; it must be {shape}.")
