"""The width-32 network of the demo and of the MNIST experiment."""

from __future__ import annotations

from torch import Tensor, nn


class Width32(nn.Module):
    """Six unpadded convolutions with LeakyReLU 0.1, then a 1x1 convolution to the logits.

    For inputs ``[B, 1, 28, 28]`` the sides go 28, 26, 24, pool 12, 10, 8, pool 4, 2, 1; the
    sixth convolution is 2x2. With ten classes and width 32 it has 205,802 parameters.

    Args:
        num_classes: How many logits it gives.
        width: Channels of the first two convolutions; the next have twice and four times as many.
    """

    def __init__(self, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.input_shape = (1, 28, 28)
        self.conv1 = nn.Conv2d(1, width, 3)
        self.conv2 = nn.Conv2d(width, width, 3)
        self.conv3 = nn.Conv2d(width, 2 * width, 3)
        self.conv4 = nn.Conv2d(2 * width, 2 * width, 3)
        self.conv5 = nn.Conv2d(2 * width, 4 * width, 3)
        self.conv6 = nn.Conv2d(4 * width, 4 * width, 2)
        self.head = nn.Conv2d(4 * width, num_classes, 1)
        self.activation = nn.LeakyReLU(0.1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``[B, 1, 28, 28]`` to logits ``[B, num_classes]``."""
        x = self.activation(self.conv1(images))
        x = self.pool(self.activation(self.conv2(x)))
        x = self.activation(self.conv3(x))
        x = self.pool(self.activation(self.conv4(x)))
        x = self.activation(self.conv5(x))
        x = self.activation(self.conv6(x))
        logits: Tensor = self.head(x).flatten(1)
        return logits


def width32(num_classes: int = 10, width: int = 32) -> Width32:
    """Build the network with random weights; the spec is ``compress.demo_data.network:width32``."""
    return Width32(num_classes, width)
