"""Running a main network for a batch of weights: one set of values for each sample."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from compress.errors import near_matches
from compress.modules.hypernet.external import HyperModule


def per_sample(
    main: HyperModule, values: Mapping[str, Tensor], *inputs: Tensor, grouped: bool = False
) -> Any:
    """Run a network once for each set of values in a batch, all at once.

    Sample b of the inputs meets the values b. In training, batch normalisation takes its
    statistics over all samples, and moves its running ones once, as for an ordinary batch; dropout
    draws for every sample on its own.

    Args:
        main: The network that holds the slots.
        values: By dotted name, ``[B, *shape]``, as a `Hypernet` emits for a batch of inputs; or
            ``[*shape]``, the same for all samples. Slots that are set already need none.
        *inputs: Of ``main``, each ``[B, ...]``, sample by sample; each sample reaches ``main`` as
            a batch of one.
        grouped: Whether the inputs are ``[B, N, ...]``, a batch of N for each set of values.

    Returns:
        What ``main`` returns, each tensor ``[B, ...]`` (``[B, N, ...]`` where grouped).

    Raises:
        ValueError: Unknown or missing names, shapes that are neither of the two, different batch
            sizes, no inputs, a network that synchronises batch normalisation over processes.
    """
    kind = type(main).__name__
    in_dims = _value_dims(main, values)
    sizes = {name: value.shape[0] for name, value in values.items() if in_dims[name] == 0}
    for index, value in enumerate(inputs):
        if value.dim() < 1 + grouped:
            raise ValueError(f"{kind}: the input {index} has shape {tuple(value.shape)}, no batch.")
        sizes[f"input {index}"] = value.shape[0]
    if not inputs:
        raise ValueError(f"{kind}: per_sample needs at least one input.")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{kind}: the values and inputs have different batch sizes: {sizes}.")

    def one(own: dict[str, Tensor], rows: tuple[Tensor, ...]) -> Any:
        with main.using_externals(own):
            if grouped:
                return main(*rows)
            return tree_map(_first, main(*(row.unsqueeze(0) for row in rows)))

    with _joint_statistics(main, inputs[0].shape[0]):
        mapped = torch.func.vmap(one, in_dims=(in_dims, 0), randomness="different")
        return mapped(dict(values), inputs)


def _value_dims(main: HyperModule, values: Mapping[str, Tensor]) -> dict[str, int | None]:
    """0 for the values that have a batch, None for those that all samples share."""
    every = dict(main._every_name())
    dims: dict[str, int | None] = {}
    for name, value in values.items():
        if name not in every:
            raise ValueError(
                f"{type(main).__name__} has no external parameter {name!r}."
                f"{near_matches(str(name), every)}"
            )
        shape = every[name].shape
        if value.shape != shape and value.shape[1:] != shape:
            raise ValueError(
                f"The external parameter {name!r} has shape {tuple(shape)} or "
                f"{('B', *shape)}; it got {tuple(value.shape)}."
            )
        dims[name] = None if value.shape == shape else 0
    return dims


def _first(value: Any) -> Any:
    return value.squeeze(0) if isinstance(value, Tensor) else value


class _OverSamples(torch.autograd.Function):
    """The mean of a tensor over the samples that `torch.func.vmap` maps; without it the tensor.

    The mean is one tensor for all samples, so that it can go into a running statistic.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        del ctx
        return grads[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor) -> tuple[Tensor, None]:
        del info
        mapped = in_dims[0]
        return (x.clone() if mapped is None else x.mean(mapped)), None


def _over_samples(x: Tensor) -> Tensor:
    return _OverSamples.apply(x)  # type: ignore[no-untyped-call, no-any-return]  # torch's


@contextlib.contextmanager
def _joint_statistics(main: nn.Module, samples: int) -> Iterator[None]:
    """Let batch normalisation that takes batch statistics take them over all samples."""
    before: list[tuple[_BatchNorm, Any]] = []
    for name, module in main.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if module.training or module.running_mean is None:
            if isinstance(module, nn.SyncBatchNorm):
                raise ValueError(f"per_sample cannot run the SyncBatchNorm {name!r} in training.")
            before.append((module, module.__dict__.get("forward")))
    try:
        for module, _ in before:
            module.__dict__["forward"] = functools.partial(_joint_forward, module, samples)
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def _joint_forward(module: _BatchNorm, samples: int, x: Tensor) -> Tensor:
    """Batch normalisation of one sample by the statistics of all."""
    module._check_input_dim(x)
    dims = [d for d in range(x.dim()) if d != 1]
    count = samples * (x.numel() // x.shape[1])
    if count < 2:
        raise ValueError(
            f"{type(module).__name__} needs more than one value per channel in training; it got "
            f"{samples} sample of shape {tuple(x.shape)}."
        )
    shape = [1, -1, *[1] * (x.dim() - 2)]
    mean = _over_samples(x.mean(dims))
    centred = x - mean.view(shape)
    var = _over_samples(centred.square().mean(dims))
    if module.training:
        _move_running(module, mean.detach(), var.detach() * (count / (count - 1)))
    normed = centred * (var + module.eps).rsqrt().view(shape)
    if module.affine:
        normed = normed * module.weight.view(shape) + module.bias.view(shape)
    return normed


def _move_running(module: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    """Update the running statistics as torch does, ``var`` unbiased."""
    if module.running_mean is None or module.running_var is None:
        return
    assert module.num_batches_tracked is not None
    module.num_batches_tracked.add_(1)
    momentum = module.momentum
    if momentum is None:  # the plain average of all batches
        momentum = 1 / float(module.num_batches_tracked)
    module.running_mean.lerp_(mean.to(module.running_mean.dtype), momentum)
    module.running_var.lerp_(var.to(module.running_var.dtype), momentum)
