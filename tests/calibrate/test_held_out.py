"""What layers lose on held-out images, against one image at a time by autograd."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from narrowable import NETWORKS, in_float64, narrower_of, prepared, recipe_of, smooth
from torch import Tensor, nn

from compress.calibrate.held_out import TOLERANCES, HeldOutLoss, held_out_losses, ratios
from compress.calibrate.statistics import Source
from compress.network.baseline import Network, prepare
from compress.network.narrowing import Cut

Split = tuple[int, ...]


class Twice(nn.Module):
    """A layer that is called twice, in place before and after, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.both = nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.both(x)) + 0.5
        x = self.relu(self.both(x))
        return self.head(x.mean((2, 3)))


def cubic(output: Tensor, labels: Tensor) -> Tensor:
    del labels
    return (output**3 * torch.arange(1.0, output.shape[1] + 1)).sum() / 3


def measured(
    network: Network, pair: tuple[Cut, nn.Module], name: str, images: Tensor, *, weigh: bool
) -> HeldOutLoss:
    """One image at a time: the gradients at a layer's outputs, times what it gets wrong."""
    cut, rewritten = pair
    layer, new = network.model.get_submodule(name), rewritten.get_submodule(name)
    each = []
    for image in images.split(1):
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def keep(
            _: nn.Module, args: tuple[Tensor], output: Tensor,
            i: list[Tensor] = inputs, o: list[Tensor] = outputs,
        ) -> Tensor:  # fmt: skip
            i.append(args[0].detach().clone())
            o.append(output)
            return output.clone()  # in-place operations then spare what is kept

        handle = layer.register_forward_hook(keep)
        value = cubic(network.model(image.clone().requires_grad_()), torch.zeros(1))
        handle.remove()
        gradients = torch.autograd.grad(value, outputs)
        change = 0.0
        for x, y, g in zip(inputs, outputs, gradients, strict=True):
            with torch.no_grad():
                error = new(cut.inputs_of(name, x)) - cut.outputs_of(name, y)
                wrong = (cut.outputs_of(name, g) * error) if weigh else error.square()
            change += float(wrong.sum())
        each.append(0.5 * (change**2 if weigh else change))
    found = torch.tensor(each, dtype=torch.float64)
    return HeldOutLoss(float(found.mean()), float(found.std()) / math.sqrt(len(each)))


def found(
    network: Network, pair: tuple[Cut, nn.Module], images: Tensor, sizes: Split, *, weigh: bool
) -> dict[str, HeldOutLoss]:
    cut, rewritten = pair
    batches = [(part, torch.zeros(len(part))) for part in images.split(list(sizes))]
    how = Source(len(images)), recipe_of(network, loss=cubic, weigh=weigh)
    names = [s.name for s in network.sites if s.skip is None]
    return held_out_losses(cut, (network.model, rewritten), names, batches, how)


@pytest.mark.parametrize("weigh", [True, False])
@pytest.mark.parametrize("name", ["mobile", "joined", "chain", "twice"])
def test_as_one_image_at_a_time_however_images_are_batched(name: str, *, weigh: bool) -> None:
    if name == "twice":
        torch.manual_seed(0)
        network = prepare(Twice().eval(), torch.zeros(1, 3, 8, 8))
        in_float64(network)
        images = smooth(12, (3, 8, 8)).double()
        rewritten = prepare(Twice().eval(), torch.zeros(1, 3, 8, 8)).model.double()
        cut = Cut(network.model, {s.name: s for s in network.sites})
    else:
        network, _ = prepared(name)
        in_float64(network)
        images = smooth(12, NETWORKS[name][1]).double()
        narrower = narrower_of(network, images)
        cut, _ = narrower.cut({g.name: g.size // 2 for g in narrower.groups()})
        rewritten = cut.model
    losses = found(network, (cut, rewritten), images, (12,), weigh=weigh)
    assert set(losses) == {s.name for s in network.sites if s.skip is None}
    for layer, loss in losses.items():
        expected = measured(network, (cut, rewritten), layer, images, weigh=weigh)
        assert loss.mean == pytest.approx(expected.mean, rel=1e-7, abs=1e-20), layer
        assert loss.error == pytest.approx(expected.error, rel=1e-7, abs=1e-20), layer
    for sizes in ((1, 11), (5, 5, 2), (1,) * 12):
        for layer, loss in found(network, (cut, rewritten), images, sizes, weigh=weigh).items():
            assert loss.mean == pytest.approx(losses[layer].mean, rel=1e-9, abs=1e-20)
            assert loss.error == pytest.approx(losses[layer].error, rel=1e-9, abs=1e-20)


def test_the_network_itself_loses_nothing() -> None:
    network, images = prepared("mobile")
    cut = Cut(network.model, {s.name: s for s in network.sites})
    losses = found(network, (cut, copy.deepcopy(network.model)), images, (3,), weigh=True)
    assert all(loss == HeldOutLoss(0.0, 0.0) for loss in losses.values())


def test_one_image_says_nothing_of_the_error_and_breaks_no_promise() -> None:
    network, images = prepared("chain")
    narrower = narrower_of(network, images)
    cut, lost = narrower.cut({"layers.0": 2})
    losses = found(network, (cut, cut.model), images[:1], (1,), weigh=True)
    assert losses["layers.2"].mean > 0
    assert losses["layers.2"].error == math.inf
    assert ratios({name: found.loss * 1e-9 for name, found in lost.items()}, losses) == {}


def test_only_what_is_clearly_worse_than_promised_is_dearer() -> None:
    losses = {
        "as promised": HeldOutLoss(1.1, 0.01),
        "noisy": HeldOutLoss(3.0, 2.0),
        "worse": HeldOutLoss(3.0, 0.1),
        "better": HeldOutLoss(0.2, 0.0),
        "just": HeldOutLoss(TOLERANCES[0][1], 0.0),
        "out of proportion": HeldOutLoss(60.0, 40.0),
        "a single image": HeldOutLoss(60.0, math.inf),
    }
    promised = dict.fromkeys(losses, 1.0)
    assert ratios(promised, losses) == {"worse": 3.0, "out of proportion": 60.0}
    again = {"worse": HeldOutLoss(5.0, 0.1), "noisy": HeldOutLoss(9.0, 0.1)}
    assert ratios(promised, losses, again) == {
        "worse": 5.0, "out of proportion": 60.0, "noisy": 9.0,
    }  # fmt: skip


def test_layers_that_only_give_less_promise_nothing_and_break_nothing() -> None:
    """A layer that loses none of its inputs is exact, up to rounding: narrower products differ."""
    network, _ = prepared("tokens")
    images = smooth(32, NETWORKS["tokens"][1])
    narrower = narrower_of(network, images)
    cut, lost = narrower.cut({"up": 8})
    batches = [(images, torch.zeros(32))]
    how = Source(32, memory_format=network.memory_format), recipe_of(network)
    losses = held_out_losses(cut, (network.model, cut.model), ["up", "down"], batches, how)
    assert losses["up"].mean < 1e-10 * losses["down"].mean
    assert ratios({"up": 0.0, "down": lost["down"].loss / 10}, losses).keys() == {"down"}
    rounding = {"up": HeldOutLoss(1e-18, 1e-19)}
    assert ratios({"up": 0.0}, rounding) == ratios({}, rounding) == {}
