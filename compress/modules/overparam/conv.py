"""`OverparamConv2d`: a chain of convolutions in training, one in evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.linalg.convolution import resolve_padding
from compress.linalg.kernels import Pair
from compress.modules.overparam.chain import as_sequence, make_chain, whole
from compress.modules.overparam.layer import OverparamLayer

KernelSizes = int | tuple[int, int] | list[Any]
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class OverparamConv2d(OverparamLayer):
    """A chain of convolutions, usable as the ``nn.Conv2d`` that it equals.

    All padding is on the first convolution and the stride on the last, so that the chain equals
    one convolution at the borders too, bias included.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel_sizes: An integer is the first kernel, the rest being 1x1; a list is the chain and
            sets the depth, its entries integers or ``(height, width)``. A tuple is one rectangular
            kernel, with a warning where the authors' code reads a chain. None is 3.
        stride: Stride of the whole.
        padding: Padding of the whole, as `nn.Conv2d` takes it.
        dilation: Dilation of every convolution.
        groups: Groups of every convolution.
        padding_mode: As `nn.Conv2d` takes it.
        width: Hidden channels as a multiple of ``out_channels``; below 1 a low-rank bottleneck.
        depth: Number of sublayers; 2 if neither it nor a list is given.
        bias: Whether every sublayer has a bias.
        batch_norm: BatchNorm after every sublayer; linear in evaluation only.
        residual: Whether to add residual branches: the centred identity of the kernels between,
            under the same padding and stride. Over an even kernel, which has no centre, the
            identity is the tap after the middle, as `torch.nn.init.dirac_` puts it (before the
            middle for ``padding="same"``, which pads the odd one last).
        residual_intervals: For each n, node m = n, 2n, ... adds node m - n; -1 is the depth.
        negative_slope: Slope below zero of the activation after the layer, for the gain of the
            initial weights: 0 for ReLU, 1 for none.
        device: Where the parameters are.
        dtype: Their dtype.

    Shape:
        As ``nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, ...)`` with
        ``kernel_size`` = sum of the kernels - depth + 1 along each axis.

    Raises:
        ValueError: Sizes, widths, depths or intervals that make no chain.

    References:
        Huh et al., "The Low-Rank Simplicity Bias in Deep Networks", TMLR 2023.
    """

    transposed = False
    output_padding = (0, 0)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: KernelSizes | None = None,
        stride: int | Pair = 1,
        padding: int | Pair | str = 1,
        *,
        dilation: int | Pair = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        width: float = 1,
        depth: int | None = None,
        bias: bool = True,
        batch_norm: bool = False,
        residual: bool = False,
        residual_intervals: int | Sequence[int] = 2,
        negative_slope: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kernel_sizes = chain_kernels("OverparamConv2d", kernel_sizes, depth)
        name = "OverparamConv2d"
        self.in_channels = whole(in_channels, name, "in_channels")
        self.out_channels = whole(out_channels, name, "out_channels")
        self.groups = whole(groups, name, "groups")
        self.width, self.batch_norm, self.residual = width, batch_norm, residual
        self.residual_intervals = residual_intervals
        self.chain = make_chain(
            name, self.in_channels, self.out_channels, self.kernel_sizes,
            width=width, groups=self.groups, early=isinstance(padding, str) and padding == "same",
            residual_intervals=residual_intervals if residual else None,
        )  # fmt: skip
        self.stride, self.dilation = _pair(stride, "stride", 1), _pair(dilation, "dilation", 1)
        self.padding = padding if isinstance(padding, str) else _pair(padding, "padding", 0)
        self.padding_mode = padding_mode
        self.kernel_size = self.chain.kernel_size
        self._check_padding()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self._assemble(
            [self._sublayer(position, bias, where) for position in range(self.depth)],
            [nn.BatchNorm2d(c, **where) for c in self.chain.channels[1:]] if batch_norm else [],
            negative_slope,
        )

    def _check_padding(self) -> None:
        if self.padding_mode not in _PADDING_MODES:
            raise ValueError(
                f"OverparamConv2d has padding_mode={self.padding_mode!r}; the modes are "
                f"{', '.join(_PADDING_MODES)}."
            )
        if isinstance(self.padding, str):
            if self.padding not in ("same", "valid"):
                raise ValueError(
                    f"OverparamConv2d has padding={self.padding!r}; it takes numbers, 'same' or "
                    "'valid'."
                )
            if self.padding == "same" and self.stride != (1, 1):
                raise ValueError(
                    f"OverparamConv2d has padding='same' and stride {self.stride}; a strided "
                    "output is never of the same size. Give the padding in numbers."
                )

    def _sublayer(self, position: int, bias: bool, where: dict[str, Any]) -> nn.Conv2d:
        (top, _), (left, _) = self._sides()
        pads = position == 0 and not self._pads_apart()
        return nn.Conv2d(
            self.chain.channels[position],
            self.chain.channels[position + 1],
            self.kernel_sizes[position],
            stride=self.stride if position == self.depth - 1 else 1,
            padding=(top, left) if pads else 0,
            dilation=self.dilation,
            groups=self.groups,
            bias=bias,
            padding_mode=self.padding_mode,  # type: ignore[arg-type]  # checked
            **where,
        )

    def _sides(self) -> tuple[Pair, Pair]:
        return resolve_padding(self.padding, self.kernel_size, self.dilation)

    def _pads_apart(self) -> bool:
        """Whether padding precedes the first convolution: unequal sides, or a branch reads it."""
        (top, bottom), (left, right) = self._sides()
        return top != bottom or left != right or bool(self.chain.intervals)

    def _pad(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        (top, bottom), (left, right) = self._sides()
        if not (top or bottom or left or right):
            return input
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(input, (left, right, top, bottom), mode=mode)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Map ``[N, C, H, W]`` (or ``[C, H, W]``) as ``nn.Conv2d`` does."""
        if self.training:
            return self.forward_expanded(input)
        weight, bias = self.effective()
        (top, bottom), (left, right) = self._sides()
        padding = (top, left)
        if self.padding_mode != "zeros" or top != bottom or left != right:
            input, padding = self._pad(input), (0, 0)  # noqa: A001 - torch's own name
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)

    def forward_expanded(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Run the chain itself, whatever the mode."""
        with self._statistics_kept_on_error():
            return self._run_chain(input)

    def _run_chain(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        nodes = [self._pad(input) if self._pads_apart() else input]
        for node, layer in enumerate(self.layers, start=1):
            value: Tensor = layer(nodes[-1])
            if len(self.norms):
                batched = value if value.dim() == 4 else value.unsqueeze(0)
                value = self.norms[node - 1](batched).view_as(value)
            for source in self.chain.sources(node):
                value = value + self._branch(nodes[source], source, node)
            nodes.append(value)
        return nodes[-1]

    def _branch(self, value: Tensor, source: int, node: int) -> Tensor:
        """The identity that a centred tap of the kernels from ``source`` to ``node`` computes."""
        span = self.chain.span(source, node)
        # The tap of the identity, and how far the other taps reach beyond it.
        (top, left), (d_h, d_w) = self.chain.middle(span), self.dilation
        bottom, right = span[0] - 1 - top, span[1] - 1 - left
        step_h, step_w = self.stride if node == self.depth else (1, 1)
        height, width = value.shape[-2:]
        rows = slice(d_h * top, height - d_h * bottom, step_h)
        return value[..., rows, slice(d_w * left, width - d_w * right, step_w)]

    @staticmethod
    def compute_same_padding(kernel_sizes: KernelSizes, dilation: int | Pair = 1) -> int | Pair:
        """Return the padding that keeps height and width at stride 1.

        Args:
            kernel_sizes: As the layer takes it.
            dilation: As the layer takes it.

        Returns:
            Rows and columns on each side, one number where they are equal.

        Raises:
            ValueError: An even chain of kernels, which no equal padding of both sides serves; give
                the layer ``padding="same"``.
        """
        chain = chain_kernels("compute_same_padding", kernel_sizes, None)
        steps = _pair(dilation, "dilation", 1)
        spans = [d * sum(k[axis] - 1 for k in chain) for axis, d in enumerate(steps)]
        if any(span % 2 for span in spans):
            raise ValueError(
                f"compute_same_padding has kernel_sizes={kernel_sizes}, an even kernel as a whole; "
                "equal padding of both sides cannot keep the size. Give padding='same' to the "
                "layer."
            )
        rows, columns = (span // 2 for span in spans)
        return rows if rows == columns else (rows, columns)

    def collapse(self) -> nn.Conv2d:
        """Return the plain ``nn.Conv2d`` that this layer equals in evaluation."""
        weight, bias = self.effective()
        plain = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=bias is not None,
            padding_mode=self.padding_mode,  # type: ignore[arg-type]  # checked
            device="meta",
            dtype=weight.dtype,
        )
        filled: nn.Conv2d = self._filled(plain)
        return filled

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_sizes={list(self.kernel_sizes)}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, padding_mode={self.padding_mode}, width={self.width}, "
            f"batch_norm={self.batch_norm}, residual={self.residual}"
        )


def chain_kernels(
    name: str, kernel_sizes: KernelSizes | None, depth: int | None
) -> tuple[Pair, ...]:
    """Read ``kernel_sizes`` and ``depth`` as the kernel of each sublayer.

    Raises:
        ValueError: A list whose length is not the depth given, or entries that are not kernels.
    """
    if isinstance(kernel_sizes, Iterable) and not isinstance(kernel_sizes, tuple | str):
        kernel_sizes = list(kernel_sizes)  # a list, or an array of numpy
        if depth is not None and depth != len(kernel_sizes):
            raise ValueError(
                f"{name} has kernel_sizes={kernel_sizes}, a chain of {len(kernel_sizes)}, and "
                f"depth={depth}; leave the depth out, or give one kernel."
            )
        return tuple(_pair(k, "kernel_sizes", 1) for k in kernel_sizes)
    depth = 2 if depth is None else whole(depth, name, "depth")
    first = _pair(3 if kernel_sizes is None else kernel_sizes, "kernel_sizes", 1)
    if isinstance(kernel_sizes, tuple):
        warnings.warn(
            f"{name} reads kernel_sizes={kernel_sizes} as one {first[0]}x{first[1]} kernel, and "
            f"not as a chain of {len(kernel_sizes)} kernels as the authors' code does. Write "
            f"{[first, *[1] * (depth - 1)]} for it, or {list(kernel_sizes)} for the chain.",
            UserWarning,
            stacklevel=3,
        )
    return (first, *[(1, 1)] * (depth - 1))


def _pair(value: Any, what: str, least: int) -> Pair:
    name = "OverparamConv2d"
    given = as_sequence(value)
    alone = len(given) == 1 and given[0] is value
    if isinstance(value, str) or not (alone or len(given) == 2):
        raise ValueError(
            f"{name} has {what}={value!r}; it takes a whole number of at least {least}, or two of "
            "them."
        )
    first, last = given[0], given[-1]
    return whole(first, name, what, least), whole(last, name, what, least)
