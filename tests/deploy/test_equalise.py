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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_the_function_stays_and_the_ranges_become_equal(case: Case) -> None:
    network, inputs = Chains(case.layer()).eval(), case.inputs()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    names = [f"chains.{name}" for name in network.chains]
    found = equalised(network, names, [inputs])
    for one, other in zip(network(inputs), found(inputs), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    for name in names:
        inside = inputs
        for part in list(found.get_submodule(name))[:-1]:
            inside = part(inside)
            channels = registered_kind(part).images(inside).movedim(1, 0).flatten(1).abs().amax(1)
            live = channels[channels > 0]
            torch.testing.assert_close(live, live.max().expand_as(live))


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
    ranges = found[0](inputs).abs().amax(0)
    torch.testing.assert_close(ranges, ranges.max().expand(3))
