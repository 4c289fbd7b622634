"""Random module trees with shared modules and tied parameters, for Hypothesis."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

SHAPE = (3, 4, 6, 6)


class Skip(nn.Module):
    """``x + body(x)``, with a parameter and a buffer of its own."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.scale = nn.Parameter(torch.rand(()) + 0.5)  # a scalar
        self.register_buffer("offset", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.body(x) + self.offset


def _leaf(draw: st.DrawFn, made: list[nn.Module]) -> nn.Module:
    kind = draw(st.sampled_from(["conv", "linear", "norm", "tanh", "again", "tied"]))
    if kind == "conv":
        k = draw(st.sampled_from([1, 3]))
        groups = draw(st.sampled_from([1, 2]))
        bias = draw(st.booleans())
        return nn.Conv2d(4, 4, k, padding=k // 2, groups=groups, bias=bias)
    if kind == "linear":
        return nn.Linear(6, 6, bias=draw(st.booleans()))
    if kind == "norm":
        return nn.BatchNorm2d(4)
    if kind == "again" and made:
        return draw(st.sampled_from(made))
    layers = [m for m in made if type(m) in (nn.Conv2d, nn.Linear)]
    if kind == "tied" and layers:
        source = draw(st.sampled_from(layers))
        if isinstance(source, nn.Conv2d):
            k = source.kernel_size[0]
            twin: nn.Module = nn.Conv2d(4, 4, k, padding=k // 2, groups=source.groups)
        else:
            twin = nn.Linear(6, 6)
        twin.weight = source.weight  # type: ignore[assignment]
        return twin
    return nn.Tanh()


def _tree(draw: st.DrawFn, depth: int, made: list[nn.Module]) -> nn.Module:
    kind = draw(st.sampled_from(["leaf", "sequence", "skip"])) if depth else "leaf"
    if kind == "sequence":
        count = draw(st.integers(1, 3))
        module: nn.Module = nn.Sequential(*[_tree(draw, depth - 1, made) for _ in range(count)])
    elif kind == "skip":
        module = Skip(_tree(draw, depth - 1, made))
    else:
        module = _leaf(draw, made)
    made.append(module)
    return module


@st.composite
def trees(draw: st.DrawFn) -> nn.Module:
    """A float64 module from and to ``SHAPE``, in evaluation mode, statistics unsettled."""
    torch.manual_seed(draw(st.integers(0, 99)))
    made: list[nn.Module] = []
    tree = _tree(draw, 3, made).double()
    for module in tree.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return tree.eval()


def sample() -> Tensor:
    """An input of the trees."""
    return torch.randn(*SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
