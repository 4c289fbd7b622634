"""A table of layers: every kind and geometry that the compressor claims to handle exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from compress.layers import kind_of
from compress.linalg.schemes import SCHEMES
from compress.network.chains import random_chain


@dataclass(frozen=True)
class Case:
    """One layer and the shape of its calibration inputs (batch first)."""

    id: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def layer(self) -> nn.Module:
        """The layer in float64, the same at every call."""
        torch.manual_seed(1)
        return self.make().double().eval()

    def inputs(self) -> Tensor:
        """Correlated inputs with a mean, as activations behind a ReLU have."""
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        for axis in range(1, x.dim()):
            x = x + 0.6 * x.roll(1, axis)
        return x.clamp_min(-0.4) + 0.2


def _case(name: str, make: Callable[[], nn.Module], *shape: int) -> Case:
    return Case(name, make, shape)


_conv, _conv1 = partial(partial, nn.Conv2d), partial(partial, nn.Conv1d)
_conv3, _up3 = partial(partial, nn.Conv3d), partial(partial, nn.ConvTranspose3d)
_up, _up1 = partial(partial, nn.ConvTranspose2d), partial(partial, nn.ConvTranspose1d)
_linear = partial(partial, nn.Linear)

CASES: tuple[Case, ...] = (
    _case("conv3x3", _conv(3, 5, 3, padding=1), 6, 3, 8, 9),
    _case("conv3x3-wide", _conv(2, 24, 3, padding=1), 6, 2, 8, 7),
    _case("conv3x3-narrow", _conv(5, 2, 3), 10, 5, 9, 9),
    _case("conv1x1", _conv(6, 5, 1), 4, 6, 5, 5),
    _case("conv1x1-stride2", _conv(5, 6, 1, stride=2), 6, 5, 7, 8),
    _case("conv-stride2", _conv(3, 4, 3, stride=2, padding=1), 12, 3, 10, 11),
    _case("conv-stride-1x3", _conv(3, 4, 3, stride=(1, 3), padding=1), 12, 3, 9, 11),
    _case("conv-dilation", _conv(3, 4, 3, padding=2, dilation=2), 6, 3, 9, 8),
    _case("conv-dilation-stride", _conv(2, 4, 3, (2, 1), (3, 1), (3, 2)), 8, 2, 10, 9),
    _case("conv-rectangular", _conv(3, 4, (3, 2), padding=(1, 0)), 6, 3, 8, 8),
    _case("conv-1x5", _conv(3, 4, (1, 5), padding=(0, 2)), 4, 3, 6, 8),
    _case("conv-even", _conv(3, 4, 4, stride=2, padding=1), 24, 3, 10, 10),
    _case("conv-same-even", _conv(3, 4, (2, 4), padding="same"), 6, 3, 7, 8),
    _case("conv-same-dilated", _conv(2, 5, (3, 2), padding="same", dilation=(1, 3)), 6, 2, 8, 8),
    _case("conv-valid", _conv(3, 4, 3, padding="valid"), 8, 3, 8, 9),
    _case("conv-groups", _conv(4, 6, 3, padding=1, groups=2), 6, 4, 8, 7),
    _case("conv-groups-wide", _conv(4, 12, (2, 1), groups=2), 6, 4, 8, 7),
    _case("conv-groups-strided", _conv(6, 4, 3, 2, 2, 2, groups=2), 16, 6, 11, 9),
    _case("conv-reflect", _conv(2, 4, 3, padding=(2, 1), padding_mode="reflect"), 6, 2, 7, 8),
    _case("conv-replicate", _conv(2, 4, 3, padding=2, padding_mode="replicate"), 6, 2, 7, 8),
    _case(
        "conv-circular",
        _conv(2, 4, (3, 2), padding=(1, 2), dilation=(1, 2), padding_mode="circular"),
        6, 2, 7, 8,
    ),
    _case(
        "conv-same-reflect-even",
        _conv(4, 6, (2, 3), padding="same", padding_mode="reflect", groups=2, bias=False),
        6, 4, 7, 8,
    ),
    _case("conv-no-bias", _conv(3, 4, 3, padding=1, bias=False), 6, 3, 8, 8),
    _case("conv-batch-1", _conv(3, 4, 3, padding=1), 1, 3, 18, 19),
    _case("conv1d", _conv1(3, 5, 4, stride=2, padding=3, dilation=2), 8, 3, 40),
    _case("conv1d-circular", _conv1(4, 5, 2, padding="same", padding_mode="circular"), 6, 4, 24),
    _case("conv1d-groups", _conv1(4, 6, 3, padding=1, groups=2, bias=False), 6, 4, 24),
    _case("up2d", _up(3, 4, 3, stride=2, padding=1, output_padding=1), 6, 3, 4, 5),
    _case("up2d-4x4", _up(4, 3, 4, stride=2, padding=1), 8, 4, 5, 5),
    _case("up2d-stride-1x3", _up(3, 5, (2, 3), (1, 3), (0, 2), (0, 1), bias=False), 6, 3, 6, 5),
    _case("up2d-dilated", _up(2, 5, 3, (2, 1), (1, 3), (1, 0), dilation=(3, 2)), 6, 2, 6, 7),
    _case("up2d-groups", _up(4, 6, 3, stride=2, padding=1, groups=2), 6, 4, 5, 5),
    _case("up1d", _up1(3, 5, 4, stride=3, padding=1, output_padding=2), 8, 3, 16),
    _case("up1d-groups", _up1(4, 6, 3, stride=2, groups=2), 8, 4, 14),
    _case("conv3d", _conv3(2, 4, 3, padding=1), 8, 2, 4, 4, 5),
    _case("conv3d-1x1", _conv3(5, 4, 1, stride=2), 6, 5, 4, 5, 5),
    _case("conv3d-strided", _conv3(2, 3, (3, 2, 3), (1, 2, 3), (1, 0, 2)), 12, 2, 5, 6, 7),
    _case("conv3d-flat", _conv3(2, 4, (1, 3, 2), padding=(0, 1, 1)), 6, 2, 3, 5, 4),
    _case("conv3d-deep", _conv3(3, 4, (3, 1, 1), padding=(1, 0, 0)), 6, 3, 5, 3, 4),
    _case(
        "conv3d-same", _conv3(2, 4, (2, 3, 2), 1, "same", (1, 2, 1), bias=False), 4, 2, 4, 6, 5
    ),
    _case("conv3d-valid", _conv3(2, 3, 2, padding="valid"), 6, 2, 4, 5, 4),
    _case("conv3d-groups", _conv3(4, 6, (2, 2, 3), padding=1, groups=2), 4, 4, 4, 4, 5),
    _case(
        "conv3d-reflect",
        _conv3(2, 3, (2, 3, 2), padding=(1, 2, 1), padding_mode="reflect"), 6, 2, 4, 5, 4,
    ),
    _case(
        "conv3d-replicate", _conv3(2, 3, 2, padding=(2, 1, 0), padding_mode="replicate"),
        6, 2, 4, 4, 4,
    ),
    _case(
        "conv3d-circular",
        _conv3(2, 3, 2, padding=(1, 0, 2), dilation=(2, 1, 2), padding_mode="circular"),
        6, 2, 4, 4, 5,
    ),
    _case("up3d", _up3(2, 3, (3, 2, 3), 2, 1, (1, 0, 1)), 4, 2, 3, 4, 3),
    _case("up3d-dilated", _up3(2, 4, 2, (1, 2, 3), (0, 1, 2), dilation=(3, 2, 1)), 6, 2, 3, 3, 4),
    _case("up3d-groups", _up3(4, 6, (2, 3, 2), 2, groups=2, bias=False), 4, 4, 3, 3, 3),
    _case("linear", _linear(7, 5), 90, 7),
    _case("linear-wide", _linear(4, 9, bias=False), 60, 4),
    _case("linear-tokens", _linear(6, 5), 5, 14, 6),
    _case("one-output", _conv(3, 1, 3), 8, 3, 9, 9),
    _case("one-output-a-group", _conv(6, 3, 3, groups=3), 6, 6, 9, 9),
)  # fmt: skip

# What is found but kept, with a word of the reason.
KEPT: tuple[tuple[Case, str], ...] = (
    (_case("depthwise", _conv(4, 4, 3, padding=1, groups=4), 2, 4, 6, 6), "depthwise"),
    (_case("depthwise-multiplier", _conv(4, 8, 3, groups=4), 2, 4, 6, 6), "depthwise"),
    (_case("depthwise-1d", _conv1(4, 4, 3, groups=4), 2, 4, 9), "depthwise"),
    (_case("depthwise-up", _up(4, 4, 2, stride=2, groups=4), 2, 4, 6, 6), "depthwise"),
    (_case("depthwise-3d", _conv3(3, 6, 2, groups=3), 2, 3, 4, 4, 4), "depthwise"),
    (_case("depthwise-up-3d", _up3(3, 3, 2, groups=3), 2, 3, 3, 3, 3), "depthwise"),
)


def random_chains(layer: nn.Module, most: int) -> dict[str, nn.Module]:
    """What each scheme makes of a layer's shape at low ranks, with random weights."""
    kind = kind_of(layer)
    assert kind is not None
    geometry, chains = kind.geometry(layer), {}
    for scheme in SCHEMES:
        if scheme.unavailable(geometry) is None:
            ranks = tuple(min(most, rank) for rank in scheme.full_ranks(geometry))
            chains[scheme.name] = random_chain(geometry, scheme.name, ranks, layer)
    return chains
