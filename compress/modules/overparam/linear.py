"""`OverparamLinear`: a chain of linear layers in training, one in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.modules.overparam.chain import make_chain, whole
from compress.modules.overparam.layer import OverparamLayer


class OverparamLinear(OverparamLayer):
    """A chain of linear layers, usable as the ``nn.Linear`` that it equals.

    Args:
        in_features: Size of each input row.
        out_features: Size of each output row.
        width: Hidden features as a multiple of ``out_features``; below 1 a low-rank bottleneck.
        depth: Number of sublayers.
        bias: Whether every sublayer has a bias.
        batch_norm: BatchNorm after every sublayer; linear in evaluation only.
        residual: Whether to add residual branches.
        residual_intervals: For each n, node m = n, 2n, ... adds node m - n; -1 is the depth.
        negative_slope: Slope below zero of the activation after the layer, for the gain of the
            initial weights: 0 for ReLU, 1 for none.
        device: Where the parameters are.
        dtype: Their dtype.

    Shape:
        ``[*, in_features]`` to ``[*, out_features]``.

    Raises:
        ValueError: Sizes, widths, depths or intervals that make no chain.

    References:
        Huh et al., "The Low-Rank Simplicity Bias in Deep Networks", TMLR 2023.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        width: float = 1,
        depth: int = 2,
        *,
        bias: bool = True,
        batch_norm: bool = False,
        residual: bool = False,
        residual_intervals: int | Sequence[int] = 2,
        negative_slope: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "OverparamLinear"
        self.in_features = whole(in_features, name, "in_features")
        self.out_features = whole(out_features, name, "out_features")
        self.width, self.batch_norm, self.residual = width, batch_norm, residual
        self.residual_intervals = residual_intervals
        self.chain = make_chain(
            name, self.in_features, self.out_features, ((1, 1),) * whole(depth, name, "depth"),
            width=width, groups=1, residual_intervals=residual_intervals if residual else None,
        )  # fmt: skip
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = self.chain.channels
        self._assemble(
            [nn.Linear(a, b, bias=bias, **where) for a, b in pairwise(sizes)],
            [nn.BatchNorm1d(b, **where) for b in sizes[1:]] if batch_norm else [],
            negative_slope,
        )

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Map ``[*, in_features]`` to ``[*, out_features]``."""
        if self.training:
            return self.forward_expanded(input)
        weight, bias = self.effective()
        return F.linear(input, weight, bias)

    def forward_expanded(self, input: Tensor) -> Tensor:  # noqa: A002
        """Run the chain itself, whatever the mode."""
        with self._statistics_kept_on_error():
            return self._run_chain(input)

    def _run_chain(self, input: Tensor) -> Tensor:  # noqa: A002
        nodes = [input]
        for node, layer in enumerate(self.layers, start=1):
            value: Tensor = layer(nodes[-1])
            if len(self.norms):
                value = self.norms[node - 1](value.reshape(-1, value.shape[-1])).view_as(value)
            for source in self.chain.sources(node):
                value = value + nodes[source]
            nodes.append(value)
        return nodes[-1]

    def collapse(self) -> nn.Linear:
        """Return the plain ``nn.Linear`` that this layer equals in evaluation."""
        weight, bias = self.effective()
        plain = nn.Linear(
            self.in_features, self.out_features, bias is not None, device="meta", dtype=weight.dtype
        )
        filled: nn.Linear = self._filled(plain)
        return filled

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"width={self.width}, depth={self.depth}, batch_norm={self.batch_norm}, "
            f"residual={self.residual}"
        )
