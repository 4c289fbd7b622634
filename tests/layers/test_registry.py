"""The registry: exact types, weights read and rebuilt, activations seen as images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compress.layers import kind_of, registered
from compress.layers.registry import LayerKind, kind_for, register

LAYERS = [
    nn.Linear(5, 7),
    nn.Linear(5, 7, bias=False),
    nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="reflect"),
    nn.Conv1d(4, 6, 3, padding="same"),
    nn.Conv2d(4, 6, (2, 3), (1, 2), (0, 1), (3, 1), 2, bias=False, padding_mode="circular"),
    nn.Conv2d(4, 6, (2, 3), padding="valid"),
    nn.ConvTranspose1d(4, 6, 3, stride=3, padding=1, output_padding=2, groups=2),
    nn.ConvTranspose2d(4, 6, (2, 3), (3, 2), (1, 0), (2, 1), 2, dilation=(1, 3), bias=False),
    nn.Conv3d(4, 6, (2, 3, 1), (1, 2, 1), (0, 1, 2), (3, 1, 1), 2, padding_mode="replicate"),
    nn.Conv3d(4, 6, 2, padding="same", bias=False),
    nn.ConvTranspose3d(4, 6, (2, 3, 1), (3, 2, 1), (1, 0, 0), (2, 1, 0), 2, dilation=(1, 3, 1)),
]
SHAPES: dict[type[nn.Module], list[tuple[int, ...]]] = {
    nn.Linear: [(3, 5), (3, 2, 5), (3, 2, 4, 5), (5,)],
    nn.Conv1d: [(3, 4, 12), (4, 12)],
    nn.Conv2d: [(3, 4, 9, 8), (4, 9, 8)],
    nn.ConvTranspose1d: [(3, 4, 6), (4, 6)],
    nn.ConvTranspose2d: [(3, 4, 6, 5), (4, 6, 5)],
    nn.Conv3d: [(3, 4, 5, 6, 4), (4, 5, 6, 4)],
    nn.ConvTranspose3d: [(3, 4, 3, 4, 2), (4, 3, 4, 2)],
}
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)


def kind(layer: nn.Module) -> LayerKind:
    found = kind_of(layer)
    assert found is not None
    return found


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@each_layer
def test_a_rebuilt_layer_is_the_same_layer(layer: Any) -> None:
    """Weight, bias and every attribute, and no random number is drawn for it."""
    state = torch.get_rng_state()
    found = kind(layer)
    geometry = found.geometry(layer)
    assert kind_for(geometry) is found
    new: Any = found.build(geometry, found.weight(layer), layer.bias)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(new) is type(layer)
    assert repr(new) == repr(layer)
    assert new.weight.is_contiguous()
    assert torch.equal(new.weight, layer.weight)
    assert (new.bias is None) == (layer.bias is None)
    for shape in SHAPES[type(layer)]:
        x = torch.randn(shape)
        assert torch.equal(new(x), layer(x))


@each_layer
def test_weights_are_read_group_by_group(layer: Any) -> None:
    geometry = kind(layer).geometry(layer)
    weight = kind(layer).weight(layer)
    channels = geometry.in_channels // geometry.groups
    assert weight.shape == (
        geometry.groups, geometry.out_features, channels, *geometry.kernel_size
    )  # fmt: skip
    assert weight.numel() == layer.weight.numel() == geometry.weight_numel
    assert not weight.requires_grad
    assert weight.data_ptr() == layer.weight.data_ptr()


@each_layer
def test_activations_become_images(layer: Any) -> None:
    """Every image keeps its place, and positions keep their order."""
    found = kind(layer)
    geometry = found.geometry(layer)
    for shape in SHAPES[type(layer)]:
        x = torch.randn(shape)
        images, y = found.images(x), layer(x)
        assert images.dim() == 2 + len(geometry.kernel_size)
        assert images.shape[1] == geometry.in_channels
        assert images.numel() == x.numel()
        lone = len(shape) == len(SHAPES[type(layer)][-1]) and shape == SHAPES[type(layer)][-1]
        assert images.shape[0] == (1 if lone else 3)
        out = found.images(y)
        size = geometry.output_size(tuple(images.shape[2:]))
        assert out.shape == (images.shape[0], geometry.out_channels, *size)
        first = x if lone else x[0]
        wanted = first.reshape(-1, 5).T if isinstance(layer, nn.Linear) else first
        assert torch.equal(images[0].flatten(), wanted.flatten())


def test_exact_types_alone_are_known() -> None:
    class Special(nn.Conv2d):
        pass

    assert kind_of(Special(3, 4, 3)) is None
    assert kind_of(nn.ReLU()) is None
    assert kind_of(nn.Bilinear(2, 3, 4)) is None
    assert kind_of(nn.Conv2d(3, 4, 3)) is not None
    assert [found.name for found in registered()] == [
        "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
        "Linear",
    ]  # fmt: skip


def test_a_second_kind_for_a_type_is_refused() -> None:
    before = registered()
    with pytest.raises(ValueError, match="Linear is registered already"):
        register(kind(nn.Linear(2, 2)))
    assert registered() == before


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 8, 3, groups=4),
        nn.Conv1d(4, 4, 3, groups=4),
        nn.ConvTranspose2d(4, 4, 2, groups=4),
    ],
    ids=str,
)
def test_depthwise_layers_are_unsupported_with_the_reason(layer: nn.Module) -> None:
    reason = kind(layer).unsupported(layer)
    assert reason is not None
    assert "depthwise" in reason


@pytest.mark.parametrize("layer", [nn.Conv2d(1, 8, 3), nn.Conv2d(4, 8, 3, groups=2)], ids=str)
def test_one_input_channel_or_some_groups_are_not_depthwise(layer: nn.Module) -> None:
    assert kind(layer).unsupported(layer) is None
