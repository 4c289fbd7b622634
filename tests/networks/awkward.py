"""Networks that users do write and that a rewrite must survive, for ``[B, 1, 8, 8]``."""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Plain(nn.Module):
    """Two convolutions, a norm and a head: what the others do something odd with."""

    input_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def early(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.first(x)))

    def late(self, x: Tensor) -> Tensor:
        return self.head(F.relu(x).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.second(self.early(x)))


class ReadsAttributes(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.early(x).to(self.second.weight.dtype))
        return self.head(F.relu(x).mean((2, 3)).view(-1, self.head.in_features))


class WeightUsedTwice(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.early(x)
        return self.late(self.second(x) + F.conv2d(x, self.second.weight, padding=1))


class OutputSize(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3, stride=2, padding=1)
        self.second = nn.ConvTranspose2d(12, 16, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.second(self.early(x), output_size=x.shape[-2:]))


class OutputSizeByPosition(OutputSize):
    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.second(self.early(x), x.shape[-2:]))


class AsksForTheType(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.early(x))
        return self.late(x * 0.5 if isinstance(self.second, nn.Conv2d) else x)


class PlainList(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [self.second]

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(x)
        for layer in self.layers:
            x = layer(x)
        return self.late(x)


class KeepsActivations(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self.seen: list[Tensor] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.second(self.early(x))
        self.seen.append(self.last)
        self.calls += 1
        return self.late(self.last)


class CountsInABuffer(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class AlwaysDropsOut(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.late(F.dropout(self.second(self.early(x)), 0.1))


class FoldsPixels(Plain):
    """The first convolution takes four channels, the image has one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pixel_unshuffle(x, 2))


class HeadFirst(nn.Module):
    """Its last convolution is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(12, 3, 1)
        self.body = nn.Conv2d(1, 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x))).mean((2, 3))


class RepeatsByValues(Plain):
    """How often a layer runs depends on values that a rewrite changes: more often after it."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(12, 16, 3, padding=1, bias=False)
        self.again = nn.Conv2d(16, 16, 3, padding=1)
        self.register_buffer("exact", self.second.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(x)
        found = self.second(x)
        error = (found - F.conv2d(x, self.exact, padding=1)).detach().abs().max()
        for _ in range(2 if float(error) > 1e-3 else 1):
            found = F.relu(self.again(found))
        return self.late(found)


class ByBatchSize(Plain):
    """One image goes another way than many."""

    def __init__(self) -> None:
        super().__init__()
        self.alone = nn.Conv2d(12, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.alone if len(x) == 1 else self.second
        return self.late(layer(self.early(x)))


class RaisesKeyError(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return {"logits": x}["logit"]


class NanAtTheEnd(Plain):
    """NaN that no layer sees, on bright images alone."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean((1, 2, 3)) > 0.5
        return torch.where(bright[:, None], torch.nan, super().forward(x))


class NanInTheMiddle(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.second(self.early(x) / 0))


class Float32Inside(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.second(self.early(x) + torch.linspace(0, 1, 8)))


class Overflows(Plain):
    """Finite in float32, infinite in float16."""

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.second(self.early(x)) * 1e9) / 1e9


def scripted() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3)))


def scripted_inside() -> nn.Module:
    return nn.Sequential(torch.jit.script(nn.Conv2d(1, 4, 3)), nn.Flatten(), nn.Linear(144, 3))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.Linear(144, 3))


def without_parameters() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(1, affine=False), nn.Flatten())


class TakesMore(nn.Module):
    """A forward with arguments that nobody passes; a tracer's proxy for them is not None."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, 3)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, pool: bool = True, *rest: Tensor
    ) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        if mask is not None:
            x = x * mask
        return self.head(x.mean((2, 3))) if pool and not rest else x


def holding_a_lock() -> nn.Module:
    model = Plain()
    model.lock = threading.Lock()
    return model


def compiled() -> nn.Module:
    return torch.compile(Plain(), backend="eager")  # type: ignore[return-value]


def failing(*_: object) -> float:
    """A metric, or a loss, that raises."""
    raise KeyError("accuracy")


def undefined(*_: object) -> float:
    """A metric that is not a number, or a loss that is not a tensor."""
    return float("nan")


def per_image(outputs: Tensor, labels: Tensor) -> Tensor:
    """A loss that is not summed."""
    return F.cross_entropy(outputs, labels, reduction="none")


def detached(outputs: Tensor, labels: Tensor) -> Tensor:
    """A loss without gradients."""
    return F.cross_entropy(outputs.detach(), labels, reduction="sum")
