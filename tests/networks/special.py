"""Layers of one's own in the styles of well-known packages, for ``[B, 1, 8, 8]``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class StaticPadding(nn.Conv2d):
    """Pads by a child that was made for one size of image, as efficientnet_pytorch does."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, size: int) -> None:
        super().__init__(inputs, outputs, kernel, stride)
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        before, after = total // 2, total - total // 2
        self.static_padding = (
            nn.ZeroPad2d((before, after, before, after)) if total else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


def same_pad(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Pad as TensorFlow does, by amounts that depend on the size of the input."""
    pads: list[int] = []
    for size, k, s, d in zip(
        x.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True
    ):
        total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
        pads = [total // 2, total - total // 2, *pads]
    return F.pad(x, pads)


class SamePadding(nn.Conv2d):
    """TensorFlow's "same", as timm's Conv2dSame."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            same_pad(x, self), self.weight, self.bias, self.stride, (0, 0), self.dilation,
            self.groups,
        )  # fmt: skip


class Standardised(nn.Conv2d):
    """Convolves with its weight standardised, as timm's StdConv2d."""

    def standardised(self) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        normal = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        return normal.reshape_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardised(), self.bias)


class StandardisedSame(Standardised):
    """As timm's StdConv2dSame."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            same_pad(x, self), self.standardised(), self.bias, self.stride, 0, self.dilation,
            self.groups,
        )  # fmt: skip


class Scaled(nn.Conv2d):
    """Standardises and then scales by a learned gain, as timm's ScaledStdConv2d."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.linspace(0.5, 2.0, self.out_channels)[:, None, None, None])

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        variance = self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
        weight = (
            self.gain * (self.weight - mean) / (variance * self.weight[0].numel() + 1e-4).sqrt()
        )
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class LowRankUpdate(nn.Linear):
    """Adds a low-rank update to its product, as adapters do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * self.up(self.down(x))


class Special(nn.Module):
    """One of each, with norms behind some."""

    input_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = StaticPadding(1, 8, 3, 2, 8)
        self.norm = nn.BatchNorm2d(8)
        self.same = SamePadding(8, 10, 3, 2)
        self.standard = Standardised(10, 10, 3, padding=1)
        self.both = StandardisedSame(10, 12, 2)
        self.scaled = Scaled(12, 12, 3, padding=1)
        self.head = LowRankUpdate(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.standard(F.relu(self.same(x))))
        x = F.relu(self.scaled(F.relu(self.both(x))))
        return self.head(x.mean((2, 3)))


class Parametrised(nn.Module):
    """Weights that are computed in every forward, in the old ways and the new."""

    input_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Conv2d(1, 12, 3, padding=1))
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.utils.weight_norm(nn.Conv2d(12, 12, 3, padding=1))
        self.third = nn.utils.spectral_norm(nn.Conv2d(12, 12, 3, padding=1))
        self.fourth = parametrizations.spectral_norm(nn.Conv2d(12, 12, 1))
        self.fifth = parametrizations.orthogonal(nn.Linear(12, 12))
        self.head = nn.Linear(12, 3)
        nn.utils.parametrize.register_parametrization(self.head, "weight", Doubled())
        nn.utils.parametrize.register_parametrization(self.head, "bias", Doubled())

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(F.relu(self.second(F.relu(self.norm(self.first(x))))))
        return self.head(F.relu(self.fifth(self.fourth(F.relu(x)).mean((2, 3)))))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def settled(model: nn.Module) -> nn.Module:
    """Give the norms statistics that show when one is folded wrongly, and leave training."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features) * 0.2
            module.running_var = torch.rand(module.num_features) + 0.5
    return model.eval()


def special() -> nn.Module:
    return settled(Special())


def parametrised() -> nn.Module:
    return settled(Parametrised())
