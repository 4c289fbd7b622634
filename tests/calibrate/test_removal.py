"""Networks with channels taken out by statistics alone, against running them."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from narrowable import NETWORKS, in_float64, narrower_of, prepared, recipe_of, smooth
from torch import Tensor, nn

from compress.calibrate.collect import calibrate
from compress.calibrate.removal import Narrower, columns_of, group_widths, readers_of, unread
from compress.calibrate.statistics import Source
from compress.linalg.moments import Moments
from compress.network.baseline import Network, prepare
from compress.plan import Choice, Plan

IMAGES = 128


def cubic(output: Tensor, labels: Tensor) -> Tensor:
    """A summed loss without random signs, whose gradients differ by image and output."""
    del labels
    return (output.movedim(1, -1) ** 3 * torch.arange(1.0, output.shape[1] + 1)).sum() / 3


def made(name: str, **settings: object) -> tuple[Network, Tensor, Narrower]:
    """A network in float64 with statistics of some images."""
    network, _ = prepared(name)
    images = smooth(IMAGES, NETWORKS[name][1]).double()
    in_float64(network)
    return network, images, narrower_of(network, images, **{"loss": cubic, **settings})


@pytest.mark.parametrize("name", list(NETWORKS))
def test_full_widths_are_the_network_itself(name: str) -> None:
    network, images, narrower = made(name)
    assert [g.name for g in narrower.groups()] == [g.name for g in network.channels.groups]
    cut, lost = narrower.cut({g.name: g.size for g in narrower.groups()})
    assert not lost
    assert cut.model is network.model
    assert narrower.statistics(cut) == dict(narrower.calibration.statistics)
    # Of a network that is narrower elsewhere, what stays whole is as it was.
    first, *others = narrower.groups()
    cut, lost = narrower.cut({first.name: first.size - 1, **{g.name: g.size for g in others}})
    alone, _ = narrower.cut({first.name: first.size - 1})
    assert set(lost) == {slot.name for slot in first.consumers}
    with torch.no_grad():
        assert torch.equal(cut.model(images), alone.model(images))


def doubled(network: Network, name: str) -> None:
    """Make the second half of a group's channels copies of the first."""
    group = network.channels.group(name)
    half = group.size // 2
    for slot in (*group.producers, *group.through):
        module = network.model.get_submodule(slot.name)
        for parameter in module.parameters():
            if parameter.dim() and len(parameter) == slot.places.numel():
                parameter.data[slot.places[half : 2 * half]] = parameter.data[slot.places[:half]]
        for buffer in module.buffers():
            if buffer.dim():
                buffer[slot.places[half : 2 * half]] = buffer[slot.places[:half]]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("mobile", "expand"), ("mobile", "stem"), ("mobile", "squeeze"), ("joined", "right"),
        ("joined", "both"), ("tokens", "up"), ("chain", "layers.0"), ("chain", "layers.5"),
    ],
)  # fmt: skip
def test_channels_that_are_copies_go_without_loss(name: str, group: str) -> None:
    network, _ = prepared(name)
    in_float64(network)
    doubled(network, group)
    # Ten for each number of a patch, else the covariance is made more even than it is.
    count = 1300 if (name, group) == ("joined", "both") else IMAGES
    images = smooth(count, NETWORKS[name][1]).double()
    narrower = narrower_of(network, images)
    size = network.channels.group(group).size
    removal = narrower.removal(group)
    assert removal.loss(size - size // 2) < 1e-6 * removal.loss(1)
    cut, lost = narrower.cut({group: size - size // 2})
    with torch.no_grad():
        before, after = network.model(images), cut.model(images)
    error = float((after - before).norm() / before.norm())
    assert error < 1e-5
    assert all(abs(found.loss) < 1e-6 * removal.loss(1) for found in lost.values())
    # What was a copy is known exactly; what was not is missed.
    cut, _ = narrower.cut({group: 1})
    with torch.no_grad():
        assert float((cut.model(images) - before).norm() / before.norm()) > max(5e-5, 20 * error)


def test_channels_that_depend_on_each_other_go_without_loss() -> None:
    """Three channels of colour, mixed into eight: three of the eight tell all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 3), nn.Flatten(), nn.Linear(180, 4))
    network = prepare(model.eval(), torch.zeros(1, 3, 8, 8))
    in_float64(network)
    images = smooth(256, (3, 8, 8)).double()
    narrower = narrower_of(network, images)
    losses = [narrower.removal("0").loss(w) for w in (8, 3, 2, 1)]
    assert losses[1] < 1e-6 * losses[2] < losses[3]
    cut, _ = narrower.cut({"0": 3})
    with torch.no_grad():
        before, after = network.model(images), cut.model(images)
    assert float((after - before).norm() / before.norm()) < 1e-5


def same(found: Moments | None, expected: Moments | None) -> None:
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    assert found.count == expected.count
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.scatter, expected.scatter, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("weigh", [True, False])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_statistics_of_what_is_left_are_those_taken_of_it(name: str, *, weigh: bool) -> None:
    """Where nobody looks at what goes, so that all layers before and after stay as they are."""
    network, _ = prepared(name)
    in_float64(network)
    stay = {g.name: torch.arange(g.size)[g.size // 3 :] for g in network.channels.groups}
    for group in network.channels.groups:
        for slot in group.consumers:
            weight = network.model.get_submodule(slot.name).get_parameter("weight").data
            transposed = isinstance(network.model.get_submodule(slot.name), nn.ConvTranspose2d)
            into = weight if transposed else weight.transpose(0, 1)
            into[slot.places[: group.size // 3].flatten()] = 0
    images = smooth(24, NETWORKS[name][1]).double()
    narrower = narrower_of(network, images, loss=cubic, weigh=weigh)
    for group in network.channels.groups:  # in this order, whatever is best
        removal = narrower.removal(group.name)
        gone = torch.arange(group.size // 3)
        narrower.calibration.removals[narrower.way(group.name), group.name] = type(removal)(
            torch.cat([gone, stay[group.name]]), removal.losses
        )
    cut, lost = narrower.cut({n: len(s) for n, s in stay.items()})
    with torch.no_grad():
        torch.testing.assert_close(cut.model(images), network.model(images), rtol=1e-5, atol=1e-7)
    assert all(found.mse < 1e-10 for found in lost.values())
    # Those weights are foretold up to the ridge: the whole network is run with the same ones.
    found = narrower.statistics(cut)
    batches = [(images, torch.zeros(len(images)))]
    recipe = recipe_of(network, loss=cubic, weigh=weigh)
    again = calibrate(cut.model, cut.sites.values(), batches, Source(len(images)), recipe)
    assert set(found) == set(again.statistics)
    for layer, expected in again.statistics.items():
        for role in ("inputs", "outputs", "weighting"):
            mine, theirs = getattr(found[layer], role), getattr(expected, role)
            assert (mine is None) == (theirs is None), (layer, role)
            if mine is not None:
                near = 1e-5 * float(theirs.scatter.abs().max()) + 1e-12
                torch.testing.assert_close(mine.scatter, theirs.scatter, rtol=1e-4, atol=near)
                assert mine.count == theirs.count


def test_statistics_before_a_lossy_cut_are_exact() -> None:
    """Layers up to those that read less see just what they saw, without what is gone."""
    network, images, narrower = made("joined")
    cut, _ = narrower.cut({"left": 2, "right": 4, "both": 5})
    found = narrower.statistics(cut)
    batches = [(images, torch.zeros(len(images)))]
    recipe = recipe_of(network, weigh=False)
    again = calibrate(cut.model, cut.sites.values(), batches, Source(len(images)), recipe)
    for name in ("left", "right", "both"):
        same(found[name].inputs, again.statistics[name].inputs)
        same(found[name].outputs, again.statistics[name].outputs)
    # What reads a flattened picture keeps all pixels of what stays.
    inputs = found["head"].inputs
    assert inputs is not None
    assert inputs.mean.shape == (1, 5 * 16)
    whole = narrower.calibration.statistics["head"].inputs
    assert whole is not None
    stay = narrower.removal("both").stay(5)
    assert torch.equal(inputs.mean, whole.mean.reshape(8, 16)[stay].reshape(1, -1))


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("chain", {"layers.0": 5}), ("chain", {"layers.2": 4}), ("chain", {"layers.5": 3}),
        ("mobile", {"stem": 4}), ("mobile", {"expand": 6}), ("joined", {"left": 2, "right": 3}),
    ],
    ids=str,
)  # fmt: skip
def test_the_predicted_loss_is_that_of_the_errors_measured(
    name: str, widths: dict[str, int]
) -> None:
    """Gradients by autograd for each image, errors by running the layer with fewer inputs."""
    network, images, narrower = made(name)
    cut, lost = narrower.cut(widths)
    readers = {s.name for g in widths for s in network.channels.group(g).consumers}
    assert set(lost) == readers
    total = 0.0
    for layer in readers:
        whole, narrow = network.model.get_submodule(layer), cut.model.get_submodule(layer)
        seen: list[Tensor] = []
        handle = whole.register_forward_hook(lambda _, args, __, s=seen: s.append(args[0]))
        with torch.no_grad():
            network.model(images)
        handle.remove()
        (x,) = seen
        kept = cut.kept[layer]
        with torch.no_grad():
            error = whole(x)
            if kept.outputs is None:
                error = error - narrow(cut.inputs_of(layer, x))
            else:  # what it gives itself goes too, which costs nothing here
                alone, _ = narrower.cut({g: w for g, w in widths.items() if g != layer})
                error = error - alone.model.get_submodule(layer)(cut.inputs_of(layer, x))
        rows = oracles.output_rows(whole, error)[0]
        weighting = oracles.weighting(
            network.model, layer, images, lambda y, _: cubic(y, torch.zeros(1))
        )
        metric = oracles.regularised(weighting)[0]
        site = network.site(layer)
        measured = 0.5 * site.positions * float(((rows @ metric) * rows).sum() / len(rows))
        assert lost[layer].loss == pytest.approx(measured, rel=1e-6)
        assert lost[layer].mse == pytest.approx(float(rows.square().mean()), rel=1e-6)
        # The bias takes what is missed on average.
        assert float(rows.mean(0).abs().max()) < 1e-9
        total += measured
    if len(widths) == 1:
        ((group, width),) = widths.items()
        assert narrower.removal(group).loss(width) == pytest.approx(total, rel=1e-3)


def test_a_narrower_network_loses_more() -> None:
    _, images, narrower = made("mobile")
    with torch.no_grad():
        before = narrower.model(images)
        apart = [
            float((narrower.cut({"expand": w})[0].model(images) - before).square().mean())
            for w in (11, 8, 4, 1)
        ]
    assert apart == sorted(apart)
    losses = [narrower.removal("expand").loss(w) for w in range(1, 13)]
    assert losses == sorted(losses, reverse=True)


def test_orders_are_worked_out_once_and_do_not_depend_on_batches() -> None:
    network, images, narrower = made("chain")
    assert narrower.removal("layers.0") is narrower.removal("layers.0")
    parts = [(p, torch.zeros(len(p))) for p in images.split([40, 3, 85])]
    recipe = recipe_of(network, loss=cubic)
    again = calibrate(network.model, network.sites, parts, Source(len(images)), recipe)
    other = Narrower(network.model, network.sites, network.channels, again)
    for group in narrower.groups():
        assert torch.equal(narrower.removal(group.name).order, other.removal(group.name).order)


def test_few_images_and_none_that_reach_a_layer() -> None:
    """One image is enough to cut; a group whose statistics are missing is left."""
    network, _ = prepared("chain")
    images = smooth(1, (3, 8, 8))
    narrower = narrower_of(network, images)
    cut, lost = narrower.cut({"layers.0": 4, "layers.5": 2})
    assert bool(cut.model(images).isfinite().all())
    assert all(math.isfinite(found.loss) for found in lost.values())
    left = dict(narrower.calibration.statistics)
    del left["layers.2"]
    without = Narrower(
        network.model, network.sites, network.channels, type(narrower.calibration)(
            left, narrower.calibration.source, "loss"
        ),
    )  # fmt: skip
    assert [g.name for g in without.groups()] == ["layers.2", "layers.5"]


def test_patches_that_are_too_long_leave_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = prepared("joined")
    sites = {site.name: site for site in network.sites}
    assert readers_of(network) == {"both", "head"}
    monkeypatch.setattr("compress.calibrate.removal.LONGEST_READER", 100)
    assert readers_of(network) == {"both"}
    assert "too long" in str(unread(network.channels.group("both"), sites))


def test_columns_of_channels() -> None:
    assert columns_of(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_the_widths_of_a_plan() -> None:
    network, _ = prepared("mobile")

    def choice(name: str, width: tuple[int, int] | None) -> Choice:
        site = network.site(name)
        return Choice(
            name, site.kind, site.shape, "narrow", (), "", 0, 0, 0, 0, 0, 0, width=width
        )  # fmt: skip

    choices = (choice("stem", (3, 4)), choice("expand", (4, 12)), choice("squeeze", None))
    plan = Plan("macs", 0.5, "loss", choices)
    assert group_widths(plan, network.channels) == {"stem": 4}
    assert group_widths(Plan("macs", 0.5, "loss", ()), network.channels) == {}


class Straight(nn.Module):
    """Two streams without activations, joined before the layer that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 1)
        self.right = nn.Conv2d(3, 8, 1)
        self.both = nn.Conv2d(14, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(torch.cat([self.left(x), self.right(x)], 1)).mean((2, 3))


def test_a_stream_that_loses_nothing_is_not_turned_beside_one_that_does() -> None:
    torch.manual_seed(0)
    images = smooth(40, (3, 8, 8))
    network = prepare(Straight().eval(), images[:1])
    assert {g.name: g.linear for g in network.channels.groups} == {"left": True, "right": True}
    narrower = narrower_of(network, images, loss=cubic)
    alone, _ = narrower.cut({"right": 3})
    beside, _ = narrower.cut({"left": 6, "right": 3})
    joined = torch.randn(2, 14, 8, 8)
    (name,) = (n for n, node in network.channels.nodes.items() if len(node.labels) == 14)
    torch.testing.assert_close(beside.of_node(name, joined), alone.of_node(name, joined))
    torch.testing.assert_close(beside.of_node(name, joined)[:, :6], joined[:, :6])
    # Three inputs make three directions: nothing is lost.
    with torch.no_grad():
        expected = network.model(images)
        torch.testing.assert_close(beside.model(images), expected, rtol=1e-3, atol=1e-4)
