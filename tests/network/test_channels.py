"""Channels that belong together: of small networks that are known, and by taking them out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from narrowable import NETWORKS, prepared
from torch import Tensor, nn

from compress.layers import registered_kind
from compress.network.baseline import Network, prepare
from compress.network.narrowing import Cut, Part, cut, resized, widths_of


def described(network: Network) -> dict[str, tuple[int, list[str], list[str], list[str]]]:
    return {
        g.name: (
            g.size, [s.name for s in g.producers], [s.name for s in g.through],
            [s.name for s in g.consumers],
        )
        for g in network.channels.groups
    }  # fmt: skip


def test_a_mobile_block_has_a_stream_and_hidden_channels() -> None:
    network, _ = prepared("mobile")
    assert described(network) == {
        "stem": (6, ["stem", "project"], [], ["expand", "head"]),
        "expand": (12, ["expand", "excite"], ["depthwise"], ["squeeze", "project"]),
        "squeeze": (4, ["squeeze"], [], ["excite"]),
    }


def test_only_a_stream_without_activations_can_be_mixed() -> None:
    network, _ = prepared("mobile")
    assert {g.name: g.linear for g in network.channels.groups} == {
        "stem": True, "expand": False, "squeeze": False,
    }  # fmt: skip
    for name in ("joined", "tokens", "chain", "upscaled"):
        assert not any(g.linear for g in prepared(name)[0].channels.groups), name


def test_joined_branches_are_groups_of_their_own_and_flattened_channels_repeat() -> None:
    network, _ = prepared("joined")
    assert described(network) == {
        "left": (4, ["left"], ["norm"], ["both"]),
        "right": (6, ["right"], ["norm"], ["both"]),
        "both": (8, ["both"], [], ["head"]),
    }
    (slot,) = network.channels.group("both").consumers
    assert slot.places.tolist() == torch.arange(128).reshape(8, 16).tolist()
    (slot,) = network.channels.group("right").consumers
    assert slot.places.flatten().tolist() == [4, 5, 6, 7, 8, 9]


def test_a_norm_over_all_features_leaves_the_stream() -> None:
    network, _ = prepared("tokens")
    assert described(network) == {"up": (16, ["up"], [], ["down"])}
    assert "down" in network.channels.left
    with pytest.raises(KeyError):
        network.channels.group("down")


def blinded(network: Network, groups: dict[str, Tensor]) -> tuple[nn.Module, Cut]:
    """The network whose readers do not look at what goes, whole; and the narrower one."""
    weights = {}
    blind = network.model
    for name, stay in groups.items():
        group = network.channels.group(name)
        mask = torch.ones(group.size, dtype=torch.bool)
        mask[stay] = False
        for slot in group.consumers:
            layer = blind.get_submodule(slot.name)
            gone = slot.places[mask].flatten()
            weight = layer.weight.data  # type: ignore[union-attr]
            transposed = isinstance(layer, nn.ConvTranspose2d)
            (weight if transposed else weight.transpose(0, 1))[gone] = 0  # type: ignore[index, operator]
    for name in groups:
        for slot in network.channels.group(name).consumers:
            layer = blind.get_submodule(slot.name)
            weight = registered_kind(layer).weight(layer).clone()
            bias = layer.bias.detach().clone()  # type: ignore[union-attr, operator]
            weights[slot.name] = (weight, bias)
    parts = {name: Part(stay) for name, stay in groups.items()}
    return blind, cut(blind, network.sites, network.channels, parts, weights)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_what_nobody_looks_at_can_go(name: str) -> None:
    network, images = prepared(name)
    assert network.channels.groups
    network.model.double()
    generator = torch.Generator().manual_seed(1)
    groups = {
        g.name: torch.randperm(g.size, generator=generator)[: g.size // 2].sort()[0]
        for g in network.channels.groups
    }
    blind, narrow = blinded(network, groups)
    with torch.no_grad():
        expected, found = blind(images.double()), narrow.model(images.double())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in narrow.model.parameters()) < sum(
        p.numel() for p in blind.parameters()
    )
    for width in narrow.widths:
        now = narrow.model.get_submodule(width.name)
        assert widths_of(now) == (width.inputs, width.outputs)
        again = resized(blind.get_submodule(width.name), width.inputs, width.outputs, biased=False)
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in now.state_dict().items()
        }


def test_taking_out_nothing_gives_the_network_itself() -> None:
    network, _ = prepared("mobile")
    groups = {g.name: Part(torch.arange(g.size)) for g in network.channels.groups}
    found = cut(network.model, network.sites, network.channels, groups, {})
    assert found.model is network.model
    assert not found.widths


class Mixed(nn.Module):
    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mix = mix
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.mix(self.first(x))).mean((2, 3))


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x.softmax(1),
        lambda x: F.group_norm(x, 2),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: x.cumsum(1),
        lambda x: x.view(x.size(0), 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
        lambda x: x.roll(1, 1),
        lambda x: x * torch.arange(8.0).view(1, 8, 1, 1),
        lambda x: torch.stack(x.chunk(8, 1), 1).squeeze(2),
        lambda x: x * x.max(1, keepdim=True).values.sigmoid(),
        lambda x: x - torch.var_mean(x, dim=1, keepdim=True)[1],
    ],
    ids=[
        "softmax", "group norm", "mean", "cumsum", "shuffle", "roll", "scaled", "chunks", "largest",
        "of two",
    ],
)  # fmt: skip
def test_what_mixes_channels_leaves_them(mix: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    network = prepare(Mixed(mix).eval(), torch.randn(1, 3, 6, 6))
    assert network.graph is not None
    assert not network.channels.groups
    assert "first" in network.channels.left


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x * torch.sigmoid(1.7 * x),
        lambda x: F.instance_norm(x),
        lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1),
        lambda x: x + 3 * x.square() - x.abs().amax((2, 3), keepdim=True),
        lambda x: x.clamp_(min=0),
    ],
    ids=["swish", "instance norm", "pool", "arithmetic", "in place"],
)
def test_what_treats_each_channel_by_itself_keeps_them_together(
    mix: Callable[[Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    network = prepare(Mixed(mix).eval(), torch.randn(1, 3, 6, 6))
    assert [(g.name, g.size) for g in network.channels.groups] == [("first", 8)]


@pytest.mark.parametrize("module", [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.PReLU(8)])
def test_a_hook_would_be_lost_with_the_channels_of_its_module(module: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), module, nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    assert prepare(model, torch.randn(1, 3, 6, 6)).channels.groups
    handle = module.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    assert not prepare(model, torch.randn(1, 3, 6, 6)).channels.groups
    handle.remove()


def test_widths_that_a_module_cannot_have() -> None:
    with pytest.raises(ValueError, match="cannot have widths 9, 2"):
        resized(nn.Conv2d(4, 8, 3), 9, 2, biased=False)
    with pytest.raises(ValueError, match="no channels"):
        widths_of(nn.ReLU())
