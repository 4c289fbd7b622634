"""Measuring a rewrite: layers against a slow oracle, gates, losses of single layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from networks.tiny import tiny
from torch import Tensor, nn
from workbench import made_images

from compress.data import Loader, as_images
from compress.errors import DataError, ModelError
from compress.inputs.functions import Metric
from compress.measure.accuracy import Yardstick, require_labels, require_ranked
from compress.measure.layers import measure_layers, measured_losses
from compress.network.baseline import prepare
from compress.running.outputs import read_outputs


def low_rank(layer: nn.Conv2d, rank: int) -> nn.Sequential:
    """A chain for a convolution by plain SVD of its weight."""
    u, s, v = torch.linalg.svd(layer.weight.detach().flatten(1), full_matrices=False)
    narrow = nn.Conv2d(
        layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False
    )
    last = nn.Conv2d(rank, layer.out_channels, 1)
    with torch.no_grad():
        narrow.weight.copy_((s[:rank, None] * v[:rank]).view_as(narrow.weight))
        last.weight.copy_(u[:, :rank, None, None])
        last.bias.copy_(torch.zeros(layer.out_channels) if layer.bias is None else layer.bias)
    return nn.Sequential(narrow, last)


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = tiny().double()
        after = copy.deepcopy(model)
        after.conv1 = low_rank(model.conv1.float(), 3).double()
        after.conv2 = low_rank(model.conv2.float(), 4).double()
    return model.double().eval(), after.eval()


def inputs(count: int = 7) -> Tensor:
    return torch.tensor(made_images(count)[0]).unsqueeze(1).double() / 255


def split(images: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for part in images.split(size):
        yield part, torch.zeros(len(part), dtype=torch.int64)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_layer_errors_equal_what_is_computed_by_hand(
    pair: tuple[nn.Module, nn.Module], size: int
) -> None:
    before, after = pair
    found = measure_layers(before, after, ["conv1", "conv2"], split(inputs(), size))
    with torch.no_grad():
        x = inputs()
        first = before.conv1(x)
        hidden = torch.relu(before.norm(first))
        second = before.conv2(hidden)
        hidden_after = torch.relu(after.norm(after.conv1(x)))
        expected = {
            "conv1": (after.conv1(x), after.conv1(x), first),
            "conv2": (after.conv2(hidden), after.conv2(hidden_after), second),
        }
    for name, (alone, in_place, reference) in expected.items():
        variance = reference.transpose(0, 1).flatten(1).var(1, correction=0).mean().item()
        for error, output in zip(found[name], (alone, in_place), strict=True):
            mse = (output - reference).square().mean().item()
            assert error.mse == pytest.approx(mse, rel=1e-9)
            assert error.relative_mse == pytest.approx(mse / variance, rel=1e-9)
    assert found["conv1"][0].mse > 1e-6


def test_measuring_leaves_no_hook_and_no_flag(pair: tuple[nn.Module, nn.Module]) -> None:
    before, after = pair
    before.train()
    state = copy.deepcopy(before.state_dict())
    with pytest.raises(ModelError):
        measure_layers(before, after, ["conv1"], [(torch.zeros(1, 2, 8, 8).double(), None)])  # type: ignore[list-item]
    measure_layers(before, after, ["conv1"], split(inputs(), 2))
    for module in (*before.modules(), *after.modules()):
        assert not module._forward_hooks
    assert all(module.training for module in before.modules())
    assert all(torch.equal(state[k], v) for k, v in before.state_dict().items())


def test_a_constant_output_has_no_relative_error() -> None:
    layer = nn.Conv2d(1, 4, 3)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, 0.7)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(144, 3))
    after = copy.deepcopy(model)
    after[0] = low_rank(layer, 1)
    found = measure_layers(model, after, ["0"], split(inputs().float(), 4))
    assert found["0"][0].mse == pytest.approx(0.0, abs=1e-12)
    assert found["0"][0].relative_mse is None


def test_the_loss_of_one_layer_is_its_divergence(pair: tuple[nn.Module, nn.Module]) -> None:
    before, after = pair
    network = replace(prepare(before.float(), inputs()[:1].float()), model=before.double())
    found = measured_losses(network, after, ["conv1", "conv2"], [inputs()])
    for name in ("conv1", "conv2"):
        single = copy.deepcopy(before)
        setattr(single, name, getattr(after, name))
        with torch.no_grad():
            p, q = before(inputs()).softmax(1), single(inputs()).softmax(1)
        expected = (p * (p / q).log()).sum(1)
        assert found[name].mean == pytest.approx(expected.mean().item(), rel=1e-8)
        error = expected.std().item() / len(expected) ** 0.5
        assert found[name].error == pytest.approx(error, rel=1e-8)
        assert isinstance(getattr(before, name), nn.Conv2d)


FIVE = Yardstick(Loader(5))


def test_comparing_equal_and_unequal_models(pair: tuple[nn.Module, nn.Module]) -> None:
    before, after = (m.float() for m in pair)
    pixels, labels = made_images(12)
    images = as_images((torch.tensor(pixels).unsqueeze(1).float() / 255, torch.tensor(labels)))
    same = FIVE.compare(before, before, images)
    assert (same.agreement, same.drop, same.mean_kl) == (1.0, 0.0, pytest.approx(0.0, abs=1e-12))
    found = FIVE.compare(before, after, images)
    with torch.no_grad():
        x = torch.stack([images[i][0] for i in range(12)])
        a, b = before(x).argmax(1), after(x).argmax(1)
    assert found.agreement == pytest.approx(float((a == b).double().mean()))
    truth = torch.tensor(labels)
    right = [float((p == truth).double().mean()) for p in (a, b)]
    assert (found.top1_before, found.top1_after) == pytest.approx(right)
    assert found.drop == pytest.approx(100 * (right[0] - right[1]))
    known = FIVE.known(before, images, "test")
    assert FIVE.compare(before, after, images, known=known) == found
    unlabelled = as_images(torch.tensor(pixels).unsqueeze(1).float() / 255)
    assert FIVE.compare(before, after, unlabelled).top1_before is None
    with pytest.raises(DataError, match="no labels"):
        require_labels(unlabelled)


def test_outputs_that_are_no_logits_ask_for_a_metric() -> None:
    images = as_images(torch.rand(4, 1, 8, 8))
    with pytest.raises(ModelError, match="--metric-fn"):
        require_ranked(read_outputs(torch.rand(4, 2, 6, 6)))

    class Finds(nn.Module):
        """As many boxes as there are bright pixels, more after than before."""

        def __init__(self, least: float) -> None:
            super().__init__()
            self.least = nn.Parameter(torch.tensor(least))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x[x > self.least], x.mean((1, 2, 3))

    count = Metric("batches", lambda _, loaded: float(len(loaded)))
    left = Yardstick(Loader(2), count).compare(Finds(0.5), Finds(0.1), images).outputs
    assert [output.path for output in left] == ["[1]"]
    with pytest.raises(ModelError, match="another shape"):
        Yardstick(Loader(2)).compare(Finds(0.5), Finds(0.1), images)
    own = Metric("batches", lambda _, loaded: float(len(loaded)))
    found = Yardstick(Loader(2), own).compare(nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3), images)
    assert found.custom is not None
    assert (found.custom.before, found.drop) == (2.0, 0.0)
