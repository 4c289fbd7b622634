"""Converting whole models: plain layers to chains that compute the same, and back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from compress.errors import near_matches
from compress.linalg.kernels import spatial_size
from compress.modules.overparam.chain import whole
from compress.modules.overparam.choice import (
    below,
    chosen_kinds,
    matches,
    warn_of_optimisers,
    warn_of_others,
)
from compress.modules.overparam.conv import KernelSizes, OverparamConv2d, chain_kernels
from compress.modules.overparam.layer import OverparamLayer
from compress.modules.overparam.linear import OverparamLinear
from compress.modules.overparam.preserve import check_kernel, split_weight

Patterns = str | Iterable[str]
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks",
)  # fmt: skip
Layer = TypeVar("Layer", bound=nn.Module)


def overparameterize(
    model: nn.Module,
    depth: int | None = None,
    width: float = 1,
    *,
    kernel_sizes: KernelSizes | None = None,
    overparam: Literal["all", "conv", "fc"] = "all",
    ignore: Iterable[nn.Module] = (),
    include: Patterns = "*",
    exclude: Patterns = (),
    batch_norm: bool = False,
    residual: bool = False,
    residual_intervals: int | Sequence[int] = 2,
    init: Literal["preserve", "fresh"] = "preserve",
    inplace: bool = True,
) -> nn.Module:
    """Replace every ``nn.Linear`` and ``nn.Conv2d`` by an over-parameterised layer, in place.

    Subclasses and layers whose weight is computed are kept, because they may compute something
    else; so are layers whose weight is tied to another module, because a chain has no weight to
    tie (both with a warning), and layers that are over-parameterised already. A module that is used
    in several places, and layers that share all their parameters, stay shared.

    Args:
        model: The model. Where it is itself such a layer, only what is returned is converted.
        depth: Number of sublayers; 2 if neither it nor a list of kernels is given.
        width: Hidden channels as a multiple of the layer's output channels.
        kernel_sizes: Chain of kernels as `OverparamConv2d` takes it; None is ``[k, 1, 1, ...]``
            with each layer's own kernel.
        overparam: Kinds of layers to convert: "conv" is ``nn.Conv2d``, "fc" ``nn.Linear``.
        ignore: Modules of the model to keep, with everything below them.
        include: Glob or globs of dotted names to convert; the root's name is empty.
        exclude: Glob or globs of names to keep, which win.
        batch_norm: BatchNorm after every sublayer.
        residual: Residual branches.
        residual_intervals: As `OverparamConv2d` takes it.
        init: "preserve": the new chain computes what the old layer did (with BatchNorm: in
            evaluation). "fresh": new weights, for training from scratch.
        inplace: Replace inside ``model``; else a copy of it is converted.

    Returns:
        The converted model.

    Raises:
        UnsupportedLayer: With "preserve", a chain that cannot hold its layer; names the layer.
        ValueError: Options that make no chain, a pattern or a module to ignore that the model
            does not have. Nothing is replaced then.

    Warns:
        UserWarning: Layers that are kept for what they are, which the authors' function converts;
            or an optimiser made before holds parameters of replaced layers, which it would step
            without any effect on the model.
    """
    if init not in ("preserve", "fresh"):
        raise ValueError(f"init={init!r} is unknown; it is 'preserve' or 'fresh'.")
    kinds = chosen_kinds(overparam)
    kept = below(model, ignore)
    memo: dict[int, Any] = {}
    target = model if inplace else copy.deepcopy(model, memo)
    if not inplace:
        kept = {id(memo[key]) for key in kept}
    patterns = _patterns(include), _patterns(exclude)
    replacements: dict[int, nn.Module] = {}
    twins: dict[tuple[Any, ...], nn.Module] = {}
    warn_of_others(target, kinds, kept, *patterns)
    for name, layer in _chosen(target, *patterns).items():
        if type(layer) not in kinds or id(layer) in kept:
            continue
        key = (repr(layer), id(layer.weight), id(layer.bias))
        if key not in twins:
            twins[key] = _expand(
                name or "the model", layer, depth=depth, width=width, kernel_sizes=kernel_sizes,
                batch_norm=batch_norm, residual=residual, residual_intervals=residual_intervals,
                preserve=init == "preserve",
            )  # fmt: skip
        replacements[id(layer)] = twins[key]
    before = {id(p): p for p in target.parameters()}
    converted = _replace(target, replacements)
    if inplace:
        warn_of_optimisers(before, converted)
    return converted


def collapse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Turn every over-parameterised layer into the plain layer that it equals in evaluation.

    Args:
        model: The model, which may itself be such a layer.
        inplace: Replace inside ``model`` instead of in a copy.

    Returns:
        The model with plain layers; modules that were shared still are.

    Warns:
        UserWarning: In place, an optimiser holds parameters of the chains, which it would step
            without any effect on the model.
    """
    replacements: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, OverparamConv2d | OverparamLinear):
            replacements[id(module)] = _carry_hooks(module, module.collapse())
    if inplace:
        before = {id(p): p for p in model.parameters()}
        collapsed = _replace(model, replacements)
        warn_of_optimisers(before, collapsed)
        return collapsed
    # The copy takes the plain layers where the chains are, which are not copied at all.
    memo: dict[int, Any] = dict(replacements)
    return copy.deepcopy(model, memo)


def _patterns(given: Patterns) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _chosen(
    model: nn.Module, include: tuple[str, ...], exclude: tuple[str, ...]
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Layers to convert by their first name, each once."""
    names: dict[int, list[str]] = {}
    layers: dict[int, nn.Linear | nn.Conv2d] = {}
    every: list[str] = []
    # The sublayers of a chain are what it is made of, not layers to expand again.
    inside = {
        id(part)
        for chain in model.modules()
        if isinstance(chain, OverparamLayer)
        for part in chain.layers
    }
    for name, module in model.named_modules(remove_duplicate=False):
        every.append(name)
        # A layer whose weight is computed (by an old-style hook) has no such parameter.
        plain = type(module) in (nn.Linear, nn.Conv2d) and "weight" in module._parameters
        if plain and id(module) not in inside:
            assert isinstance(module, nn.Linear | nn.Conv2d)
            names.setdefault(id(module), []).append(name)
            layers[id(module)] = module
    eligible = [name for group in names.values() for name in group]
    for pattern in (*include, *exclude):
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in eligible):
            others = sorted(
                {type(model.get_submodule(n)).__name__ for n in every if fnmatchcase(n, pattern)}
            )
            found = f" It matches modules of other kinds: {', '.join(others)}." if others else ""
            raise ValueError(
                f"The pattern {pattern!r} matches no nn.Linear or nn.Conv2d of the model."
                f"{found}{near_matches(pattern, eligible)}"
            )
    chosen = {
        group[0]: layers[key] for key, group in names.items() if matches(group, include, exclude)
    }
    return {n: layer for n, layer in chosen.items() if not _tied(model, n, layer)}


def _tied(model: nn.Module, name: str, layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether a module that is not a twin of the layer holds one of its parameters; warn if so."""
    own = {id(p) for p in layer.parameters()}
    for other_name, other in model.named_modules():
        shared = own & {id(p) for p in other._parameters.values() if p is not None}
        if not shared or other is layer:
            continue
        twin = repr(other) == repr(layer) and type(other) is type(layer)
        if not twin or other.weight is not layer.weight or other.bias is not layer.bias:
            warnings.warn(
                f"{name} is kept as it is: it shares a parameter with {other_name}, and a chain "
                "has no parameter to share.",
                UserWarning,
                stacklevel=5,
            )
            return True
    return False


def _expand(
    name: str,
    layer: nn.Linear | nn.Conv2d,
    *,
    depth: int | None,
    width: float,
    kernel_sizes: KernelSizes | None,
    preserve: bool,
    **options: Any,
) -> nn.Module:
    where = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    options |= {"width": width, "bias": layer.bias is not None, **where}
    new: OverparamLinear | OverparamConv2d
    try:
        if isinstance(layer, nn.Linear):
            if depth is None:
                depth = len(kernel_sizes) if isinstance(kernel_sizes, list) else 2
            new = OverparamLinear(layer.in_features, layer.out_features, depth=depth, **options)
        else:
            if kernel_sizes is None:
                size = (layer.kernel_size[0], layer.kernel_size[1])
                count = 2 if depth is None else whole(depth, "overparameterize", "depth")
                kernel_sizes = [size, *[1] * (count - 1)]
            kernels = chain_kernels("overparameterize", kernel_sizes, depth)
            padding = layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)
            new = OverparamConv2d(
                layer.in_channels, layer.out_channels, list(kernels), stride=tuple(layer.stride),  # type: ignore[arg-type]  # pairs
                padding=padding, dilation=tuple(layer.dilation), groups=layer.groups,  # type: ignore[arg-type]  # pairs
                padding_mode=layer.padding_mode, **options,
            )  # fmt: skip
    except ValueError as error:
        raise type(error)(f"{name} cannot be over-parameterised: {error}") from error
    kernel = layer.weight if layer.weight.dim() == 4 else layer.weight[:, :, None, None]
    check_kernel(name, spatial_size(kernel), new.chain)
    if preserve and not kernel.is_meta:
        _fill(new, split_weight(name, kernel.detach(), new.chain), layer.bias)
    for sublayer in new.layers:
        sublayer.weight.requires_grad_(layer.weight.requires_grad)
        if layer.bias is not None:
            sublayer.bias.requires_grad_(layer.bias.requires_grad)
    return _carry_hooks(layer, new.train(layer.training))


def _fill(new: OverparamLayer, factors: list[Tensor], bias: Tensor | None) -> None:
    """Copy factors into the sublayers, undoing what a fresh BatchNorm divides by in evaluation."""
    sublayer: Any
    with torch.no_grad():
        for position, (sublayer, factor) in enumerate(zip(new.layers, factors, strict=True)):
            norm: Any = new.norms[position] if len(new.norms) else None
            undo = 1.0 if norm is None else (1 + norm.eps) ** 0.5
            sublayer.weight.copy_((factor * undo).view_as(sublayer.weight))
            if bias is not None and position == new.depth - 1:
                sublayer.bias.copy_(bias.to(factor.dtype) * undo)


def _carry_hooks(old: nn.Module, new: Layer) -> Layer:
    for kind in _HOOKS:
        getattr(new, kind).update(getattr(old, kind))
    return new


def _replace(model: nn.Module, replacements: dict[int, nn.Module]) -> nn.Module:
    if id(model) in replacements:
        return replacements[id(model)]
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and id(child) in replacements:
                module._modules[name] = replacements[id(child)]
    return model
