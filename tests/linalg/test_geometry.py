"""Patches and shapes against torch's own unfold, fold and forward passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.linalg.geometry import Geometry, output_rows, patch_rows, patch_view

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


def image(*shape: int) -> Tensor:
    return torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float64).sin().reshape(shape)


@given(
    kernel=pairs,
    stride=pairs,
    dilation=pairs,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    groups=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    size=st.tuples(st.integers(3, 8), st.integers(3, 8)),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_patches_equal_unfold_of_the_padded_image(
    kernel: Any, stride: Any, dilation: Any, padding: Any, groups: int, mode: str, size: Any
) -> None:
    geometry = Geometry(
        "conv2d", 4, 2, kernel, stride, padding, dilation, groups=groups, padding_mode=mode
    )
    height, width = geometry.output_size(size)
    assume(height > 0 and width > 0)
    x = image(2, 4, *size)
    sides = (padding[1], padding[1], padding[0], padding[0])
    padded = F.pad(x, sides, mode="constant" if mode == "zeros" else mode)
    columns = F.unfold(padded, kernel, dilation=dilation, stride=stride)  # [batch, c k k, places]
    rows = columns.transpose(1, 2).reshape(-1, groups, geometry.in_features).transpose(0, 1)
    assert torch.equal(patch_rows(x, geometry), rows)
    assert columns.shape[2] == height * width
    assert patch_view(x, geometry).shape == (2, 4, height, width, *kernel)


@given(
    kernel=pairs,
    stride=pairs,
    dilation=pairs,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    extra=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    groups=st.sampled_from([1, 2]),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_transposed_convolutions_multiply_their_patches(
    kernel: Any, stride: Any, dilation: Any, padding: Any, extra: Any, groups: int
) -> None:
    assume(all(e < max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)))
    geometry = Geometry(
        "conv_transpose2d", 4, 6, kernel, stride, padding, dilation,
        groups=groups, output_padding=extra,
    )  # fmt: skip
    size = geometry.output_size((4, 5))
    assume(min(size) > 0)
    x, weight = image(2, 4, 4, 5), image(4, 6 // groups, *kernel)
    y = F.conv_transpose2d(x, weight, None, stride, padding, extra, groups, dilation)
    assert y.shape[2:] == size
    matrix = weight.reshape(groups, 4 // groups, 6 // groups, -1).transpose(1, 2).flatten(2)
    rows = patch_rows(x, geometry)
    torch.testing.assert_close(rows @ matrix.mT, output_rows(y, geometry))
    view = patch_view(x, geometry)
    flat = view.permute(0, 2, 3, 1, 4, 5).reshape(rows.shape[1], groups, -1)
    assert torch.equal(flat.transpose(0, 1), rows)


@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (4, 2), (3, 5)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_named_paddings_are_torchs(kernel: Any, dilation: Any, padding: str, mode: str) -> None:
    layer = nn.Conv2d(
        2, 3, kernel, padding=padding, dilation=dilation, padding_mode=mode, bias=False,
        dtype=torch.float64,
    )  # fmt: skip
    geometry = Geometry(
        "conv2d", 2, 3, kernel, padding=padding, dilation=dilation, padding_mode=mode
    )
    x = image(2, 2, 13, 14)
    y = layer(x).detach()
    assert y.shape[2:] == geometry.output_size((13, 14))
    found = patch_rows(x, geometry) @ layer.weight.detach().flatten(1).T
    torch.testing.assert_close(found, output_rows(y, geometry))


@pytest.mark.parametrize("kind", ["conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("windows", [1, 3])
def test_chosen_positions_are_rows_of_all_of_them(kind: Any, windows: int) -> None:
    """Also where windows of an image are folded into the batch: the place counts across them."""
    geometry = Geometry(kind, 4, 4, (3, 2), (2, 2), (1, 0), groups=2)
    x = image(2 * windows, 4, 6, 5)
    height, width = geometry.output_size((6, 5))
    places = windows * height * width
    positions = torch.tensor([[0, places - 1, 5, 5], [places // 2, 1, 2, places - 2]])
    wanted = torch.cat([positions[0], positions[1] + places])
    assert torch.equal(patch_rows(x, geometry, positions), patch_rows(x, geometry)[:, wanted])
    y = image(2 * windows, 4, height, width)
    assert torch.equal(output_rows(y, geometry, positions), output_rows(y, geometry)[:, wanted])


def test_patches_of_strided_and_expanded_activations() -> None:
    geometry = Geometry("conv2d", 3, 2, (2, 2), padding=(0, 0))
    x = image(2, 3, 5, 6)
    assert torch.equal(
        patch_rows(x.to(memory_format=torch.channels_last), geometry), patch_rows(x, geometry)
    )
    shared = x[:1].expand(4, -1, -1, -1)
    assert torch.equal(patch_rows(shared, geometry), patch_rows(shared.contiguous(), geometry))
    part = x[:, :, 1:, 2:]
    assert torch.equal(patch_rows(part, geometry), patch_rows(part.contiguous(), geometry))


def test_sizes_of_a_group() -> None:
    geometry = Geometry("conv2d", 8, 12, (3, 5), groups=4)
    assert geometry.in_features == 2 * 15
    assert geometry.out_features == 3
    assert geometry.full_rank == 3
    assert geometry.weight_numel == nn.Conv2d(8, 12, (3, 5), groups=4).weight.numel()
    assert geometry.with_(groups=2).in_features == 4 * 15


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2])
def test_patches_in_three_dimensions_are_those_that_torch_multiplies(
    mode: str, groups: int
) -> None:
    """Taken by ``Tensor.unfold`` axis by axis, and multiplied as ``nn.Conv3d`` does."""
    layer = nn.Conv3d(
        4,
        6,
        (2, 3, 2),
        (2, 1, 3),
        (1, 2, 0),
        (1, 1, 2),
        groups,
        padding_mode=mode,  # type: ignore[arg-type]
    ).double()
    geometry = Geometry(
        "conv3d", 4, 6, (2, 3, 2), (2, 1, 3), (1, 2, 0), (1, 1, 2), groups, padding_mode=mode
    )
    x = image(2, 4, 5, 6, 8)
    padded = F.pad(x, (0, 0, 2, 2, 1, 1), mode="constant" if mode == "zeros" else mode)
    taps = padded.unfold(2, 2, 2).unfold(3, 3, 1).unfold(4, 3, 3)[..., ::2]
    wanted = taps.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, groups, geometry.in_features)
    rows = patch_rows(x, geometry)
    assert torch.equal(rows, wanted.transpose(0, 1))
    assert torch.equal(patch_view(x, geometry), taps)
    matrix = layer.weight.detach().reshape(groups, 6 // groups, -1)
    y = layer(x).detach()
    assert y.shape[2:] == geometry.output_size((5, 6, 8))
    bias = layer.bias.detach().reshape(groups, 1, -1)  # type: ignore[union-attr]
    torch.testing.assert_close(rows @ matrix.mT + bias, output_rows(y, geometry))
    places = torch.tensor([[0, 5, 17], [3, 3, 11]])
    count = y[0, 0].numel()
    chosen = [*places[0].tolist(), *(count + places[1]).tolist()]
    assert torch.equal(patch_rows(x, geometry, places), rows[:, chosen])
    assert torch.equal(output_rows(y, geometry, places), output_rows(y, geometry)[:, chosen])
