"""A small network for clips ``[B, 1, 6, 8, 8]``, and clips."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class Video(nn.Module):
    """Convolutions and a transposed one in three dimensions, one of them called twice."""

    input_shape = (1, 6, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm3d(12)
        self.down = nn.Conv3d(12, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose3d(16, 12, 2, 2)
        self.flat = nn.Conv3d(12, 12, (1, 3, 3), padding=(0, 1, 1))
        self.grouped = nn.Conv3d(12, 12, 3, padding=1, groups=2)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.up(torch.relu(self.down(x)))
        x = torch.relu(self.grouped(torch.relu(self.flat(torch.relu(x)))))
        return self.head(x.mean((2, 3, 4)))


def video() -> nn.Module:
    torch.manual_seed(0)
    return Video().eval()


class Clips(Dataset[tuple[Tensor, int]]):
    """Noise that grows in time, more so for some classes."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = [index % 3 for index in range(count)]
        growth = torch.linspace(0.5, 1.5, 6)[:, None, None]
        noise = torch.randn(count, 1, 6, 8, 8, generator=generator)
        self.clips = noise * growth ** torch.tensor(self.targets)[:, None, None, None, None]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.clips[index], self.targets[index]


def clips(count: int = 32, seed: int = 0) -> Clips:
    return Clips(count, seed)
