"""Random small graphs: what nobody looks at can be taken out of every group, exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compress.choose.choices import narrowed_site
from compress.layers import kind_of, registered_kind
from compress.network.baseline import Network, prepare
from compress.network.channels import ChannelGroup
from compress.network.narrowing import Cut, Part, cut, widths_of

EXACT = {"rtol": 1e-9, "atol": 1e-9}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu, F.silu, torch.tanh, lambda x: F.leaky_relu(x, 0.2), lambda x: x * x.sigmoid()
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One step of a random network.

    Attributes:
        kind: What is done to the stream.
        width: Channels of what it adds.
        kernel: Size of its convolution.
        activation: Number of what follows.
    """

    kind: str
    width: int
    kernel: int
    activation: int


class Drawn(nn.Module):
    """A stream that steps change, add to, join to or share layers of, and a head."""

    def __init__(self, steps: list[Step], flat: bool) -> None:
        super().__init__()
        self.steps, self.flat = steps, flat
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.parts = nn.ModuleList()
        count = 6
        for step in steps:
            part, count = _part(step, count)
            self.parts.append(part)
        self.head = nn.Linear(count * (4 if flat else 1), 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for step, part in zip(self.steps, self.parts, strict=True):
            x = _applied(step, part, x)
        if self.flat:
            return self.head(F.adaptive_max_pool2d(x, 2).flatten(1))
        return self.head(x.mean((2, 3)))


def _conv(inputs: int, outputs: int, kernel: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)


def _part(step: Step, count: int) -> tuple[nn.Module, int]:
    """The modules of a step, and how many channels the stream has after it."""
    width, kernel = step.width, step.kernel
    if step.kind == "plain":
        return nn.ModuleList([_conv(count, width, kernel)]), width
    if step.kind == "depthwise":
        return nn.ModuleList([_conv(count, count, 3, count)]), count
    if step.kind == "norm":
        return nn.ModuleList([nn.BatchNorm2d(count)]), count
    if step.kind == "slopes":
        return nn.ModuleList([nn.PReLU(count)]), count
    if step.kind == "grouped":
        groups = 2 if count % 2 == 0 else 1
        return nn.ModuleList([_conv(count, 2 * width, kernel, groups)]), 2 * width
    if step.kind == "joined":
        return nn.ModuleList([_conv(count, width, kernel)]), count + width
    if step.kind == "shared":  # the layer in the middle is called twice
        shared = _conv(width, width, kernel)
        return nn.ModuleList([_conv(count, width, 1), shared, _conv(width, count, 1)]), count
    hidden = _conv(count, width, 1), _conv(width, width, 3, width), _conv(width, count, 1)
    return nn.ModuleList(hidden if step.kind == "inverted" else (hidden[0], hidden[2])), count


def _applied(step: Step, part: nn.ModuleList, x: Tensor) -> Tensor:
    act = ACTIVATIONS[step.activation]
    if step.kind == "joined":
        return torch.cat([x, act(part[0](x))], 1)
    if step.kind in ("residual", "inverted"):
        y = x
        for layer in part[:-1]:
            y = act(layer(y))
        return x + part[-1](y)
    if step.kind == "shared":
        return x + part[2](act(part[1](act(part[1](act(part[0](x)))))))
    if step.kind in ("norm", "slopes"):
        return part[0](x)
    return act(part[0](x))


KINDS = (
    "plain", "depthwise", "norm", "slopes", "grouped", "joined", "shared", "residual", "inverted",
)  # fmt: skip
drawn_steps = st.lists(
    st.builds(
        Step, st.sampled_from(KINDS), st.integers(2, 5), st.sampled_from([1, 3]),
        st.integers(0, len(ACTIVATIONS) - 1),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


def built(steps: list[Step], *, flat: bool) -> Network:
    torch.manual_seed(0)
    model = Drawn(steps, flat).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    network = prepare(model, torch.randn(1, 3, 6, 6))
    assert network.graph is not None
    assert network.channels is not None
    network.model.double()
    return network


def blinded(network: Network, stays: dict[str, Part]) -> dict[str, tuple[Tensor, Tensor]]:
    """Let no layer look at what goes; the weights of mixed inputs and biases of those that did."""
    turns: dict[str, Tensor] = {}
    for name, part in stays.items():
        group = network.channels.group(name)
        turn = torch.eye(group.size, dtype=torch.float64) if part.turn is None else part.turn
        gone = turn[[i for i in range(group.size) if i not in part.stay.tolist()]]
        for slot in group.consumers:
            layer = network.model.get_submodule(slot.name)
            weight = layer.get_parameter("weight").data
            transposed = type(layer).__name__.startswith("ConvTranspose")
            into = weight if transposed else weight.transpose(0, 1)
            whole = turns.setdefault(slot.name, torch.eye(len(into), dtype=torch.float64))
            for places in slot.places.T:
                seen = torch.tensordot(gone.to(into), into[places], dims=([1], [0]))
                into[places] -= torch.tensordot(gone.T.to(into), seen, dims=([1], [0]))
                whole[places.unsqueeze(1), places] = turn
    found = {}
    for slot in (s for name in stays for s in network.channels.group(name).consumers):
        layer = network.model.get_submodule(slot.name)
        kind = registered_kind(layer)
        bias = layer._parameters.get("bias")
        zeros = torch.zeros(kind.geometry(layer).out_channels, dtype=torch.float64)
        weight = kind.weight(layer)
        mixed = torch.einsum("goi...,ji->goj...", weight, turns[slot.name].to(weight))
        found[slot.name] = (mixed, zeros if bias is None else bias.detach())
    return found


def halves(group: ChannelGroup, generator: torch.Generator) -> Part:
    """Half of the channels, of mixtures of them where these would do as well."""
    stay = torch.randperm(group.size, generator=generator)[: (group.size + 1) // 2].sort()[0]
    if not group.linear:
        return Part(stay)
    drawn = torch.randn(group.size, group.size, generator=generator, dtype=torch.float64)
    return Part(stay, torch.linalg.qr(drawn)[0])


def check_costs(network: Network, found: Cut, images: Tensor) -> None:
    """What sites say of a narrower network is what torch counts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        found.model(images[:1])
    elsewhere = network.macs - sum(site.macs for site in network.sites)
    assert counter.get_total_flops() == 2 * (elsewhere + sum(s.macs for s in found.sites.values()))
    for width in found.widths:
        module = found.model.get_submodule(width.name)
        assert widths_of(module) == (width.inputs, width.outputs)
        if width.name in found.sites:
            site = network.site(width.name)
            again = narrowed_site(site, (width.inputs, width.outputs))
            assert again.geometry == found.sites[width.name].geometry


@settings(derandomize=True, deadline=None, max_examples=30)
@given(drawn_steps, st.booleans())
def test_half_of_every_group_can_go_once_it_is_not_read(steps: list[Step], flat: bool) -> None:
    network = built(steps, flat=flat)
    generator = torch.Generator().manual_seed(1)
    stays = {g.name: halves(g, generator) for g in network.channels.groups}
    if "grouped" not in [step.kind for step in steps]:
        assert stays, "every such network has something to take out"
    weights = blinded(network, stays)
    found = cut(network.model, network.sites, network.channels, stays, weights)
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        expected, narrow = network.model(images), found.model(images)
    torch.testing.assert_close(narrow, expected, **EXACT)
    check_costs(network, found, images)
    # Groups part the channels: none is made, changed or read by two of them.
    for role in ("producers", "consumers", "through"):
        seen: dict[str, set[int]] = {}
        for group in network.channels.groups:
            for slot in getattr(group, role):
                places = set(slot.places.flatten().tolist())
                assert len(places) == slot.places.numel()
                assert not places & seen.setdefault(slot.name, set())
                seen[slot.name] |= places
                assert len(slot.places) == group.size
    # Whoever makes what stays gives the same of it as before.
    for name, (axis, part) in found.nodes.items():
        assert axis >= 1
        assert part.stay.tolist() == sorted(set(part.stay.tolist())), name


def between(case: Case) -> tuple[Network, Tensor]:
    """A layer of the contract's table between two others that can become narrower with it."""
    layer, x = case.layer(), case.inputs()
    geometry = kind_of(layer).geometry(layer)
    pointwise = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    build = nn.Linear if geometry.kind == "linear" else pointwise[x.dim()]
    size = () if geometry.kind == "linear" else (1,)
    model = nn.Sequential(
        build(geometry.in_channels, geometry.in_channels, *size), nn.Tanh(), layer, nn.Tanh(),
        build(geometry.out_channels, 4, *size),
    )  # fmt: skip
    network = prepare(model.float().eval(), x[:1].float())
    assert network.channels is not None  # read in float32, as runs do
    network.model.double()
    return network, x.double()


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_every_layer_kind_becomes_narrower_on_both_sides(case: Case) -> None:
    """Those with several groups are left, and so is what they read and make."""
    torch.manual_seed(0)
    layer = case.layer()
    geometry = kind_of(layer).geometry(layer)
    network, images = between(case)
    groups = {g.name: g for g in network.channels.groups}
    if geometry.groups > 1:
        assert not groups
        return
    whole = {"0": geometry.in_channels, "2": geometry.out_channels}
    assert {n: g.size for n, g in groups.items()} == {n: c for n, c in whole.items() if c > 1}
    generator = torch.Generator().manual_seed(1)
    stays = {n: halves(g, generator) for n, g in groups.items()}
    found = cut(
        network.model, network.sites, network.channels, stays, blinded(network, stays)
    )  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(found.model(images), network.model(images), **EXACT)
    check_costs(network, found, images)
