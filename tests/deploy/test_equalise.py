"""Equalised chains: the same function, with channels in between that reach equally far."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, random_chains
from torch import Tensor, nn

from compress.deploy.equalise import equalised
from compress.layers.registry import registered_kind


class Chains(nn.Module):
    """What each scheme makes of a layer's shape, with channels of very different sizes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.chains = nn.ModuleDict(random_chains(layer, 3))
        for chain in self.chains.values():
            first = chain[0]
            weight = registered_kind(first).weight(first)
            sizes = 10.0 ** -torch.arange(weight.shape[1], dtype=weight.dtype)
            with torch.no_grad():
                weight.mul_(sizes.view(1, -1, *[1] * (weight.dim() - 2)))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [chain(x) for chain in self.chains.values()]


def rounded(x: Tensor, step: Tensor) -> Tensor:
    return torch.where(step > 0, (x / step).round() * step, x)


def eight_bits(chain: nn.Module, inputs: Tensor) -> Tensor:
    """What a chain gives where each layer's inputs and weights are rounded as in eight bits."""
    for part in chain:
        kind = registered_kind(part)
        geometry, weight = kind.geometry(part), kind.weight(part)
        steps = weight.abs().amax(tuple(range(2, weight.dim())), keepdim=True) / 64
        built = kind.build(geometry, rounded(weight, steps), part.bias)
        inputs = built(rounded(inputs, inputs.abs().max() / 255))
    return inputs


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_the_function_stays_and_rounding_moves_it_no_farther(case: Case) -> None:
    network, inputs = Chains(case.layer()).eval(), case.inputs()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    names = [f"chains.{name}" for name in network.chains]
    found = equalised(network, names, [inputs])
    for one, other in zip(network(inputs), found(inputs), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    with torch.no_grad():
        apart = [
            sum(
                float((eight_bits(net.get_submodule(name), inputs) - expected).norm() / norm)
                for name, expected, norm in zip(names, exact, norms, strict=True)
            )
            for net in (network, found)
            for exact in [network(inputs)]
            for norms in [[e.norm().clamp_min(1e-12) for e in exact]]
        ]
    assert apart[1] < 1.1 * apart[0]


def test_small_channels_that_matter_are_blown_up() -> None:
    """What the second layer makes large again would be lost between the steps of the largest."""
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 6)).double()
    sizes = torch.tensor([1.0, 1e-1, 1e-2, 1e-3], dtype=torch.float64)
    with torch.no_grad():
        chain[0].weight.mul_(sizes[:, None])
        chain[1].weight.div_(sizes)
    inputs = torch.randn(64, 8, dtype=torch.float64)
    found = equalised(chain, [""], [inputs])
    with torch.no_grad():
        expected = chain(inputs)
        apart = [(eight_bits(net, inputs) - expected).norm() for net in (chain, found)]
    assert apart[1] < apart[0] / 4


def test_dead_channels_and_whole_dead_chains_are_left() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 5)),
        nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 2)),
    ).double()
    with torch.no_grad():
        model[0][0].weight[1] = 0
        model[1][0].weight.zero_()
    inputs = torch.randn(6, 4, dtype=torch.float64)
    found = equalised(model, ["0", "1"], [inputs])
    torch.testing.assert_close(found(inputs), model(inputs))
    assert all(value.isfinite().all() for value in found.state_dict().values())


def test_a_network_that_is_one_chain() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 5))
    inputs = torch.randn(6, 4)
    found = equalised(model, [""], [inputs])
    torch.testing.assert_close(found(inputs), model(inputs))
