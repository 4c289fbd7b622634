"""The options of a hypernetwork, checked, under this package's names and HyperLight's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

import torch
from torch import nn

from compress.errors import near_matches
from compress.modules.hypernet.initialization import Distribution, check_distribution
from compress.modules.hypernet.sizes import size

Activation = str | Callable[[], nn.Module]
Bias = float | Literal["spread"] | None
# HyperLight's keyword arguments of the hidden network.
_FC = ("dropout_prob", "nonlinearity", "norm", "init_distribution", "init_bias", "out_bias")


class HypernetOptions(TypedDict, total=False):
    """Options of `Hypernet`, which describes them."""

    layer_sizes: Sequence[int] | None
    nonlinearity: Activation
    norm: Callable[[int], nn.Module] | None
    dropout_prob: float
    init_distribution: Distribution | None
    init_bias: Bias
    init_independent_weights: bool
    output_split_init: bool
    fc_kws: Mapping[str, Any] | None
    device: torch.device | str | None
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Settings:
    """Options with their defaults; those of ``fc_kws`` are in their places."""

    layer_sizes: Sequence[int] | None = None
    nonlinearity: Activation = nn.LeakyReLU
    norm: Callable[[int], nn.Module] | None = None
    dropout_prob: float = 0.0
    init_distribution: str | None = "constant_norm"
    init_bias: Bias = "spread"
    init_independent_weights: bool = True
    output_split_init: bool = True
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def activation(self) -> nn.Module:
        """Return a new module between two layers."""
        make = self.nonlinearity
        if isinstance(make, str):
            make = getattr(nn, make)
        return make()


def settings_of(given: Mapping[str, Any]) -> Settings:
    """Return the settings that options ask for.

    Raises:
        TypeError: An unknown option, a value of the wrong type.
        ValueError: An unknown key of ``fc_kws``, an option given twice, a value out of range.
    """
    options = dict(given)
    inner = options.pop("fc_kws", None) or {}
    known = [field.name for field in fields(Settings)]
    for name in options:
        if name not in known:
            raise TypeError(f"Hypernet has no option {name!r}.{near_matches(name, known)}")
    for name, value in inner.items():
        if name not in _FC:
            raise ValueError(f"fc_kws has no key {name!r}.{near_matches(str(name), _FC)}")
        if name in options:
            raise ValueError(f"Hypernet got {name!r} as an option and in fc_kws.")
        if name == "out_bias":
            if not value:
                raise ValueError(
                    "fc_kws: out_bias=False leaves out the independent weights, which Hypernet "
                    "always has; set them to zero and freeze_independent_weights() instead."
                )
            continue
        options[name] = value
    settings = Settings(**options)
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    check_distribution("init_distribution", settings.init_distribution)
    probability = settings.dropout_prob
    if isinstance(probability, bool) or not isinstance(probability, int | float):
        raise TypeError(f"dropout_prob must be a number, not {probability!r}.")
    if not 0 <= probability < 1:
        raise ValueError(f"dropout_prob={probability} must be at least 0 and below 1.")
    bias = settings.init_bias
    number = isinstance(bias, int | float) and not isinstance(bias, bool)
    if not (bias is None or bias == "spread" or (number and math.isfinite(bias))):
        raise ValueError(f"init_bias={bias!r} must be a finite number, 'spread' or None.")
    for name in ("init_independent_weights", "output_split_init"):
        if not isinstance(getattr(settings, name), bool):
            raise TypeError(f"{name} must be True or False, not {getattr(settings, name)!r}.")
    kind = settings.nonlinearity
    if isinstance(kind, str):
        found = getattr(nn, kind, None)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise ValueError(f"nonlinearity={kind!r} names no class of torch.nn.")
    elif not callable(kind) or isinstance(kind, nn.Module):
        raise TypeError(
            f"nonlinearity makes a module, as nn.ReLU does; it is a {type(kind).__name__}."
        )


def hidden_sizes_of(hidden: Sequence[int] | None, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Return the widths, given under either of their two names.

    Raises:
        TypeError: Widths that are not integers.
        ValueError: Both names or neither, widths below 1.
    """
    if (hidden is None) == (layers is None):
        given = "both" if hidden is not None else "neither"
        raise ValueError(
            f"Hypernet takes hidden_sizes or layer_sizes, which are the same; it got {given}."
        )
    sizes = hidden if hidden is not None else layers
    if isinstance(sizes, str) or not hasattr(sizes, "__iter__"):
        raise TypeError(f"Hypernet: hidden_sizes must be a list of integers, not {sizes!r}.")
    assert sizes is not None
    what = f"Hypernet: in hidden_sizes={list(sizes)} the width"
    return tuple(size(f"{what} {index}", width) for index, width in enumerate(sizes))


def perceptron(inputs: int, widths: Sequence[int], settings: Settings) -> nn.Sequential:
    """Return the hidden layers: linear, norm, nonlinearity and dropout, as far as there are any."""
    where: dict[str, Any] = {"device": settings.device, "dtype": settings.dtype}
    layers: list[nn.Module] = []
    for width in widths:
        layers.append(nn.Linear(inputs, width, **where))
        if settings.norm is not None:
            layers.append(settings.norm(width).to(**where))
        layers.append(settings.activation())
        if settings.dropout_prob > 0:
            layers.append(nn.Dropout(settings.dropout_prob))
        inputs = width
    return nn.Sequential(*layers)
